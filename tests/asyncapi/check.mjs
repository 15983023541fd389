// Has the official parser read an AsyncAPI document: node check.mjs FILE. Exit code 1 if it has an error.
import { readFile } from "node:fs/promises";
import { Parser } from "@asyncapi/parser";

const SEVERITIES = ["error", "warning"]; // below these it only has advice, such as that there is a newer AsyncAPI
const file = process.argv[2];
const { document, diagnostics } = await new Parser().parse(await readFile(file, "utf8"));
for (const { severity, path, message, code } of diagnostics.filter(({ severity }) => severity in SEVERITIES)) {
  console.error(`${file}: ${SEVERITIES[severity]} at ${path.join(".") || "the top"}: ${message} (${code})`);
}
const isValid = document !== undefined && diagnostics.every(({ severity }) => SEVERITIES[severity] !== "error");
console.log(`${file} is ${isValid ? "a valid" : "no valid"} AsyncAPI document`);
process.exitCode = isValid ? 0 : 1;
