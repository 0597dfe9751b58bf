"""What a training script says, read from its text: it is not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from novoscale.tools.configs import ConfigError, text_of

REGISTERS = "novoscale.integrations.deepspeed"
NOVOGRAD = ("novoscale.NovoGrad", "novoscale.optimizer.novograd.NovoGrad")
# Packages whose capitalised names are optimizers.
OPTIMIZERS = (
    "torch.optim.",
    "bitsandbytes.optim.",
    "apex.optimizers.",
    "deepspeed.ops.",
    "pytorch_optimizer.",
    "torchao.optim.",
    "transformers.optimization.Adafactor",
    "transformers.Adafactor",
    *NOVOGRAD,
)


@dataclass(frozen=True)
class Call:
    """A call: the full name of what is called, its line, its keywords as far as they are literals."""

    name: str
    line: int
    keywords: dict[str, Any]

    @property
    def short(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def is_novograd(self) -> bool:
        """Whether it makes a NovoGrad."""
        return self.name in NOVOGRAD


@dataclass(frozen=True)
class Unknown:
    """A keyword whose value is not a literal; its text."""

    text: str


@dataclass(frozen=True)
class Script:
    """What a script says that decides which optimizer runs.

    Attributes:
        registered: the line on which NovoGrad is registered with DeepSpeed, or None.
        names: full names of what is imported and used.
    """

    path: Path
    registered: int | None
    calls: tuple[Call, ...] = field(repr=False)
    names: frozenset[str] = field(repr=False)

    def call(self, *endings: str) -> Call | None:
        """The first call of a function of this name, or whose name ends so."""
        return next((c for c in self.calls if c.short.endswith(endings) or c.name in endings), None)

    @property
    def trainer(self) -> Call | None:
        """The Trainer, of transformers or derived from it."""
        return self.call("Trainer")

    @property
    def initialize(self) -> Call | None:
        """DeepSpeed's own start."""
        return self.call("deepspeed.initialize")

    @property
    def arguments(self) -> Call | None:
        """The arguments of the Trainer, if they are made in the script."""
        return self.call("TrainingArguments")

    @property
    def optimizer(self) -> Call | None:
        """The optimizer that the script makes."""
        made = [c for c in self.calls if c.name.startswith(OPTIMIZERS) and c.short[:1].isupper()]
        made = [c for c in made if "lr_scheduler" not in c.name]
        return next((c for c in made if c.is_novograd), made[0] if made else None)

    @property
    def runner(self) -> str | None:
        """Who trains: "trainer", "accelerate", "deepspeed"; None if none of them."""
        if self.trainer is not None:
            return "trainer"
        if self.call("Accelerator") is not None:
            return "accelerate"
        return "deepspeed" if self.initialize is not None else None

    @property
    def starts(self) -> Call | None:
        """The call by which DeepSpeed is started, and must know NovoGrad."""
        by = {"trainer": ("train",), "accelerate": ("prepare",), "deepspeed": ("deepspeed.initialize",)}
        return self.call(*by.get(self.runner or "", ("deepspeed.initialize",)))

    @property
    def has_novograd(self) -> bool:
        """Whether it makes a NovoGrad, or hands the class to the Trainer."""
        return any(name in NOVOGRAD for name in self.names)


def read_script(path: Path) -> Script:
    """Read a script.

    Raises:
        ConfigError: it cannot be read, or is not Python.
    """
    text = text_of(path)
    try:
        tree = ast.parse(text, str(path))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: not a Python script: {error}") from None
    known = dict(_imported(tree))
    calls = sorted(_calls(tree, known), key=lambda call: call.line)
    names = {_full(node, known) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))}
    return Script(path, _registered(tree, calls), tuple(calls), frozenset(names))


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names, and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.asname, a.name) for a in node.names if a.asname)
        elif isinstance(node, ast.ImportFrom):
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def _calls(tree: ast.AST, known: dict[str, str]) -> Iterator[Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg or "**": _literal(k.value) for k in node.keywords}
            yield Call(_full(node.func, known), node.lineno, keywords)


def _full(node: ast.expr, known: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return known.get(first, first) + dot + rest


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Unknown(ast.unparse(node))


def _registered(tree: ast.AST, calls: list[Call]) -> int | None:
    """The line of the import that registers NovoGrad."""
    lines = [line for line, name in _imports(tree) if f"{name}.".startswith(f"{REGISTERS}.")]
    lines += [c.line for c in calls if c.short == "import_module" and _imports_it(tree, c.line)]
    return min(lines, default=None)


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines, and full names of what is imported there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names)


def _imports_it(tree: ast.AST, line: int) -> bool:
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.lineno == line)
    return any(n.value == REGISTERS for n in constants)
