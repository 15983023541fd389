// Generates the models of an AsyncAPI document for Java, Python and TypeScript, as an upstream system would, and holds
// that they are of use: node models.mjs FILE FOLDER. The folder gets one folder for each language.
import assert from "node:assert/strict";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { JavaGenerator, PYTHON_PYDANTIC_PRESET, PythonGenerator, TypeScriptGenerator } from "@asyncapi/modelina";

// Types of each field in Java, Python and TypeScript. A question mark: it may be absent, or in Java and Python null.
const CLASSES = {
  ExecuteCommand: {
    command_id: ["String?", "str?", "string?"],
    imei: ["String", "str", "string"],
    obj_id: ["int", "int", "number"],
    obj_inst_id: ["int", "int", "number"],
    res_id: ["int", "int", "number"],
    expired_time: ["String", "str", "string"],
    valid_time: ["String?", "str?", "string?"],
    retry: ["Integer?", "int?", "number?"],
    timeout: ["Integer?", "int?", "number?"],
    trigger_msg: ["Set<TriggerMessage>?", "List[TriggerMessage]?", "TriggerMessage[]?"],
    args: ["String?", "str?", "string?"],
    product: ["String?", "str?", "string?"],
  },
  ExecuteReply: {
    command_id: ["String?", "str?", "string | null"],
    status: ["ReplyStatus", "ReplyStatus", "ReplyStatus"],
    uuid: ["String?", "str?", "string | null"],
    imei: ["String?", "str?", "string | null"],
    error: ["ReplyError?", "ReplyError?", "ReplyError | null"],
    attempts: ["int", "int", "number"],
    recovered: ["boolean", "bool", "boolean"],
    valid_time_omitted: ["boolean", "bool", "boolean"],
    completed_at: ["java.time.OffsetDateTime", "str", "string"],
  },
  ReplyError: {
    code: ["ErrorCode", "ErrorCode", "ErrorCode"],
    message: ["String", "str", "string"],
    errno: ["Integer?", "int?", "number | null"],
    details: ["Detail[]?", "List[Detail]?", "Detail[] | null"],
  },
  Detail: { field: ["String", "str", "string"], message: ["String", "str", "string"] },
  ExecuteResult: {
    command_id: ["String", "str", "string"],
    uuid: ["String", "str", "string"],
    imei: ["String", "str", "string"],
    result: ["ResultKind", "ResultKind", "ResultKind"],
    confirm_status: ["String?", "str?", "string | null"],
    sent_at: ["java.time.OffsetDateTime?", "str?", "string | null"],
    confirmed_at: ["java.time.OffsetDateTime?", "str?", "string | null"],
    observed_at: ["java.time.OffsetDateTime", "str", "string"],
  },
};
const ENUMS = {
  TriggerMessage: ["REGISTER", "UPDATE", "NOTIFY"],
  ReplyStatus: ["accepted", "rejected", "failed"],
  ErrorCode: [
    "invalid_message",
    "invalid_command",
    "unknown_product",
    "expired",
    "retries_exhausted",
    "outcome_unknown",
    "poison_message",
    "command_id_conflict",
    "onenet_rejected",
    "http_rejected",
  ],
  ResultKind: ["executed", "failed", "expired", "cancelled", "unknown"],
};
const MESSAGES = { command: "ExecuteCommand", reply: "ExecuteReply", result: "ExecuteResult" };
const PACKAGE = "onenet_models";

// Modelina leaves the null out of a reference in TypeScript; docs/contracts/README.md shows these options.
const nullableReference = ({ constrainedModel: { name, options } }) => (options.isNullable ? `${name} | null` : name);
const LANGUAGES = [
  ["java", new JavaGenerator(), "java", { packageName: PACKAGE }],
  ["python", new PythonGenerator({ presets: [PYTHON_PYDANTIC_PRESET] }), "py", { packageName: PACKAGE }],
  [
    "typescript",
    new TypeScriptGenerator({
      modelType: "interface",
      enumType: "union",
      rawPropertyNames: true,
      typeMapping: { Reference: nullableReference },
    }),
    "ts",
    { exportType: "named" },
  ],
];

const [file, folder] = process.argv.slice(2);
const document = JSON.parse(await readFile(file, "utf8"));
for (const [number, [language, generator, extension, options]] of LANGUAGES.entries()) {
  const models = (await generator.generateCompleteModels(document, options)).filter(({ result }) => result !== "");
  const found = Object.fromEntries(models.map(({ modelName, model }) => [modelName, contentOf(model, language)]));
  const classes = Object.entries(CLASSES).map(([name, fields]) => [
    name,
    Object.fromEntries(Object.entries(fields).map(([field, types]) => [field, types[number]])),
  ]);
  assert.deepEqual(found, { ...Object.fromEntries(classes), ...ENUMS }, language);
  const place = `${folder}/${language}/${PACKAGE}`;
  await mkdir(place, { recursive: true });
  for (const { modelName, result } of models) {
    const name = language === "python" ? modelName.replace(/(?<=.)(?=[A-Z])/g, "_").toLowerCase() : modelName;
    await writeFile(`${place}/${name}.${extension}`, result);
  }
}
const { messages } = document.components;
const samples = Object.entries(MESSAGES).flatMap(([message, model]) =>
  messages[message].examples.map(({ payload }) => ({ model, payload })),
);
await writeFile(`${folder}/typescript/samples.ts`, samples.map(typescriptSample).join("\n"));
await writeFile(`${folder}/python/samples.json`, JSON.stringify(samples));
console.log(`${file} gives useful models for ${LANGUAGES.map(([language]) => language).join(", ")}`);

function contentOf(model, language) {
  if (model.values) {
    return model.values.map(({ originalInput }) => originalInput);
  }
  if (!model.properties) {
    return model.type;
  }
  return Object.fromEntries(
    Object.values(model.properties).map(({ unconstrainedPropertyName, property, required }) => {
      const isNull = property.options.isNullable && language !== "typescript"; // there it is part of the type
      return [unconstrainedPropertyName, property.type + (required && !isNull ? "" : "?")];
    }),
  );
}

function typescriptSample({ model, payload }, number) {
  const place = `./${PACKAGE}/${model}`;
  return `import { ${model} as Model${number} } from "${place}";
export const sample${number}: Model${number} = ${JSON.stringify(payload)};`;
}
