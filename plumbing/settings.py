"""Settings: the fields of dataclasses, set by plain Python files and by flags."""

import ast
import difflib
import inspect
import re
import sys
import traceback
import types
import typing
from dataclasses import fields
from pathlib import Path

from plumbing.errors import InputError, as_input_error, first_line

# Settings of nanoGPT that have no counterpart of the same name: what to do here instead
WANDB = "every run writes metrics.csv, and docs/other_software.md sends it to W&B in five lines"
OF_NANOGPT = {
    "gradient_accumulation_steps": "batch_size counts the sequences of a whole step, "
                                   "micro_batch_size those processed at once, and the number of "
                                   "accumulation steps follows",
    "decay_lr": "the learning rate decays to min_lr, and stays constant if min_lr=learning_rate",
    "backend": "the device decides: NCCL on GPUs, gloo on CPUs",
    "always_save_checkpoint": "ckpt.pt is always the last state, best.pt the best one",
    "wandb_log": WANDB,
    "wandb_project": WANDB,
    "wandb_run_name": WANDB,
}


def read_settings(argv, doc, *classes):
    """
    argv      config files, and --key=value, --key value or --flag, in any order; flags win over
              files, later ones over earlier ones
    doc       what --help prints above the list of all settings
    classes   dataclasses whose fields are the settings; what is not set keeps its default there

    returns   a list with one instance per class, and {name: "file" or "flag"} for what was given
    raises    InputError for an unknown name, a wrong type, a file that cannot be run, or a value
              that a class refuses with a ValueError
    """
    kinds = {}
    for cls in classes:
        kinds.update({f.name: f.type for f in fields(cls)})
    from_files = {}
    from_flags = {}
    args = list(argv)
    while args:
        arg = args.pop(0)
        if any("\ud800" <= c <= "\udfff" for c in arg):   # so Python passes on other bytes
            raise InputError(f"{ascii(arg)} is not UTF-8")
        if arg in ("-h", "--help"):
            print_help(doc, classes)
            sys.exit(0)
        if arg.startswith("-"):
            name, value = read_flag(arg, args, kinds)
            from_flags[name] = value
        else:
            for name, value in run_config_file(arg, kinds).items():
                from_files[name] = check(name, value, kinds, f"{arg}: ")

    values = from_files | from_flags
    given = dict.fromkeys(from_files, "file") | dict.fromkeys(from_flags, "flag")
    instances = []
    with as_input_error():
        for cls in classes:
            own = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            instances.append(cls(**own))
    return instances, given


def read_flag(arg, args, kinds):
    """--name=value, --name value or --flag -> name, value; a value that follows leaves args."""
    name, equals, text = arg.lstrip("-").partition("=")   # the value may contain "=" as well
    can_be_bare = name not in kinds or bool in allowed_types(kinds[name])
    if not equals:
        if can_be_bare:
            has_value = bool(args) and args[0].lower() in ("true", "false", "none")
            text = args.pop(0) if has_value else "True"
        elif args and not args[0].startswith("--"):
            text = args.pop(0)
        else:
            raise InputError(f"--{name} needs a value")
    is_text = name in kinds and str in allowed_types(kinds[name])
    value = text if is_text else parse(text)
    return name, check(name, value, kinds, "--")


def parse(text):
    """The Python value that text spells (true, false and none in any case), or the text itself."""
    if text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def run_config_file(path, kinds):
    """
    Run a config file in a namespace of its own -> {name: value} of the plain values it sets, and of
    all that have the name of a setting.
    """
    try:
        source = Path(path).read_text(encoding="utf-8-sig")   # some editors add a byte-order mark
    except (OSError, UnicodeDecodeError) as e:
        problem = getattr(e, "strerror", None) or "not UTF-8 text"
        there = sorted(p.as_posix() for p in Path("config").glob("*.py"))
        if there:
            hint = f"there are {', '.join(there)}"
        else:
            hint = "there is no config/*.py here, run the command in the folder of train.py"
        raise InputError(f"cannot read the config file {path}: {problem}; {hint}") from None
    namespace = {"__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        where = path
        line = line_of_error(e, path)
        if line:
            where += f", line {line}"
        raise InputError(f"{where}: {type(e).__name__}: {first_line(e)}") from None
    return {k: v for k, v in namespace.items() if k in kinds or is_plain(k, v)}


def is_plain(name, value):
    """False for what a config file needs only for itself: _names, modules, functions, classes."""
    return not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value))


def line_of_error(e, path):
    """The line of the file at path in which e was raised, or None."""
    frames = traceback.extract_tb(e.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if lines:
        return lines[-1]
    return getattr(e, "lineno", None)   # a SyntaxError of the file itself has no frame in it


def allowed_types(kind):
    """int | tuple[int, ...] | None -> (int, tuple, NoneType)"""
    alternatives = typing.get_args(kind) or (kind,)
    return tuple(typing.get_origin(t) or t for t in alternatives)


def check(name, value, kinds, where):
    """
    value, if name is a setting and value has its type; an int is accepted for a float, a list for a
    tuple. where is what stands before the name in an error: "--" or the name of a file.
    """
    if name in OF_NANOGPT:
        raise InputError(f"{where}{name} is nanoGPT's: here {OF_NANOGPT[name]}")
    if name not in kinds:
        similar = difflib.get_close_matches(name, kinds, 1)
        guess = f", did you mean {similar[0]}?" if similar else ""
        raise InputError(
            f"{where}{name} is not a setting{guess} (--help lists all settings; names of your own "
            "must begin with _)"
        )
    allowed = allowed_types(kinds[name])
    if float in allowed and type(value) is int:
        value = float(value)
    if tuple in allowed and type(value) is list:
        value = tuple(value)
    if type(value) not in allowed:   # not isinstance: True is an int
        found = type(value).__name__
        wanted = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
        raise InputError(f"{where}{name}={value!r} is of type {found}, must be {wanted}")
    return value


def print_help(doc, classes):
    """Print doc, then every setting with its default and the comment beside its field."""
    print(doc)
    for cls in classes:
        print(f"{cls.__name__}: {cls.__doc__}")
        source = inspect.getsource(cls)
        for f in fields(cls):
            comment = re.search(rf"^    {f.name}:.*?  # (.*)$", source, re.MULTILINE)
            setting = f"  --{f.name}={f.default}"
            print(f"{setting:<36}", comment[1] if comment else "")
        print()
