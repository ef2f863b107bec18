"""The fields of OptVQConfig as flags."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from typing import Any, Literal, get_args

from ..configuration_fields_optvq import OptVQFields


# Comes with a model that `optvq convert` made, as does the backbone "diffusers".
OF_CONVERSION = ("autoencoder",)


def _model_fields() -> Iterator[tuple[str, Any, Any]]:
    """OptVQConfig's own fields as optional flags, with the help of their docstring."""
    text = inspect.getdoc(OptVQFields) or ""
    helps = dict(re.findall(r"^ {4}(\w+): (.+?)(?=\n {4}\w+: |\Z)", text, re.MULTILINE | re.DOTALL))
    for entry in fields(OptVQFields):
        name, default = entry.name, entry.default
        if name in OF_CONVERSION:
            continue
        flag_type: Any
        if isinstance(default, tuple):
            flag_type, default = list[int], " ".join(map(str, default))
        elif isinstance(default, float):
            flag_type = float
        elif name == "backbone":
            flag_type = Literal[*(value for value in get_args(entry.type) if value != "diffusers")]
        else:
            flag_type = entry.type
        text = re.sub(r"\s+", " ", helps[name]).replace("%", "%%").strip()
        yield name, flag_type | None, field(default=None, metadata={"help": f"{text} (default: {default})"})


ModelArguments = make_dataclass("ModelArguments", _model_fields(), namespace={"_argument_group_name": "model"})
ModelArguments.__doc__ = """The fields of OptVQConfig; None keeps the default, or the value of the given model."""
