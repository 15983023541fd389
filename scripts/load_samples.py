"""Loads messages into the Python models that `make asyncapi` generated: ``python -m scripts.load_samples FOLDER``.

The folder has the package of the models, and ``samples.json``: names of models, each with a message.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path


def main(folder: Path) -> None:
    """Load each message, and hold that the model has all of it."""
    sys.path.insert(0, str(folder))
    for sample in json.loads((folder / "samples.json").read_text()):
        name, payload = sample["model"], sample["payload"]
        module = import_module(f"onenet_models.{re.sub('(?<=.)(?=[A-Z])', '_', name).lower()}")
        loaded = getattr(module, name).model_validate(payload)
        assert loaded.model_dump(mode="json", exclude_unset=True) == payload, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
