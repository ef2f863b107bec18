"""The fields of OptVQConfig as flags."""

import re
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from typing import Any, Literal, get_args

from ..configuration_optvq import OptVQConfig


# Comes with a model that `optvq convert` made, as does the backbone "diffusers".
OF_CONVERSION = ("autoencoder",)


def _model_fields() -> Iterator[tuple[str, Any, Any]]:
    """OptVQConfig's own fields as optional flags, with the help of its docstring."""
    helps = dict(
        re.findall(r"^ {8}(\w+): (.+?)(?=\n {8}\w+: |\n {4}\S|\Z)", OptVQConfig.__doc__ or "", re.MULTILINE | re.DOTALL)
    )
    for name, annotation in OptVQConfig.__annotations__.items():
        if name not in OptVQConfig.__dataclass_fields__ or name in OF_CONVERSION:
            continue
        default = OptVQConfig.__dataclass_fields__[name].default
        flag_type: Any
        if isinstance(default, tuple):
            flag_type, default = list[int], " ".join(map(str, default))
        elif isinstance(default, float):
            flag_type = float
        elif name == "backbone":
            flag_type = Literal[*(value for value in get_args(annotation) if value != "diffusers")]
        else:
            flag_type = annotation
        text = re.sub(r"\s+", " ", helps[name]).replace("%", "%%").strip()
        yield name, flag_type | None, field(default=None, metadata={"help": f"{text} (default: {default})"})


ModelArguments = make_dataclass("ModelArguments", _model_fields(), namespace={"_argument_group_name": "model"})
ModelArguments.__doc__ = """The fields of OptVQConfig; None keeps the default, or the value of the given model."""
