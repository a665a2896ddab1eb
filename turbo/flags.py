"""The command line of every command: flags read, mistakes told in one line, exit statuses.

    0    done                         2      a wrong flag or input, told as `error: ...`
    1    it could not be done         130    ended by Ctrl-C      143    ended by SIGTERM
                                      129    a run of turbo.train whose terminal was closed

Standard output that cannot be written is a 1, where nobody reads it any more a 141.

The fields of a dataclass are the flags, and the text under a field is its help (tyro); one that
inherits from several dataclasses has a section of --help for each. What tyro says of a mistake
fills a box; here it is one line, and an unknown flag names the nearest one.

Left out: what the flags of a command mean, and whether their values can work together.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import dropwhile, takewhile
from typing import Annotated, TextIO, TypeVar, get_args, get_origin, get_type_hints

import tyro

Settings = TypeVar("Settings")
POSITIONAL = get_args(tyro.conf.Positional[int])[1]  # how tyro marks such a field
TYRO = ("-h", "--help", "--tyro-print-completion", "--tyro-write-completion")
# What other trainers call it -> what it is called here
ALIASES = {
    "--lr": "--learning-rate",
    "--batch-size": "--minibatch",
    "--mini-batch-size": "--minibatch",
    "--beta": "--kl-coef",
    "--output-dir": "--out",
    "--max-steps": "--updates",
    "--iterations": "--updates",
    "--num-envs": "--envs",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--max-tokens": "--max-new-tokens",
    "--max-grad-norm": "--grad-clip",
    "--lam": "--gae-lambda",
    "--load-in-4bit": "--quantize",
    "--resume-from-checkpoint": "--resume",
    "--config": "--like",
}
_FLAG = re.compile(r"-[A-Za-z]|--\w")  # and no negative number
_FRAME = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|-{4,}")


def read_flags(
    kind: type[Settings],
    argv: Sequence[str],
    prog: str,
    default: Settings | None = None,
    **options,
) -> Settings:
    """The settings on a command line; ValueError says in one line what is wrong with it.

    `default` stands for what is not given; `options` go to tyro. With --help the help is printed
    and the program ends.
    """
    if told := unknown_flag(argv, flags(kind), alone(kind)):
        raise ValueError(f"{told} (see {prog} --help)")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _read(kind, argv, default, prog=prog, **options)
    except BrokenPipeError:  # of the help; no OSError to be told
        sys.exit(_unread())
    except SystemExit as ended:
        if not ended.code:
            raise
        told = in_one_line(said.getvalue()).replace("Unrecognized options:", "too many words:")
        raise ValueError(f"{told} (see {prog} --help)") from None


def _read(kind: type[Settings], argv: Sequence[str], default: Settings | None, **options):
    """By tyro; dataclasses that `kind` is made of are read as its sections, which have a title."""
    parts = [base for base in reversed(kind.__bases__) if dataclasses.is_dataclass(base)]
    if not parts:
        if default is not None:
            options["default"] = default
        return tyro.cli(kind, args=list(argv), **options)

    def section(part: type):  # as the default has it
        values = {f.name: getattr(default, f.name) for f in dataclasses.fields(part)}
        return part(**values)

    names = [part.__name__.removesuffix("Settings").lower() for part in parts]
    hints = [tyro.conf.OmitArgPrefixes[part] for part in parts]
    whole = dataclasses.make_dataclass(kind.__name__, zip(names, hints, strict=True))
    options.setdefault("description", kind.__doc__)
    if default is not None:
        options["default"] = whole(*map(section, parts))
    read = tyro.cli(whole, args=list(argv), **options)
    return kind(**{k: v for name in names for k, v in vars(getattr(read, name)).items()})


def flag(name: str) -> str:
    """How a field is called on the command line."""
    return "--" + name.replace("_", "-")


def flag_of(word: str) -> str:
    """The flag that a word of the command line names, if it is one."""
    return word.partition("=")[0].replace("_", "-")


def flags(kind: type) -> list[str]:
    """The names of the flags that a dataclass makes, those of dataclasses inside it included."""
    names = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        plain = get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(plain):
            names += flags(plain)
        elif POSITIONAL not in marks:
            names += [flag(name), flag(f"no_{name}")] if plain is bool else [flag(name)]
    return names


def alone(kind: type) -> list[str]:
    """What would be the flags of the fields that stand alone, without a name."""
    hints = get_type_hints(kind, include_extras=True)
    return [flag(name) for name, hint in hints.items() if POSITIONAL in get_args(hint)[1:]]


def unknown_flag(argv: Sequence[str], known: Sequence[str], alone: Sequence[str] = ()) -> str:
    """What is wrong with the first flag that is not among the `known`; nothing where all are.

    Those in `alone` are no flags: what they would name stands by itself.
    """
    for name in map(flag_of, argv):
        if not _FLAG.match(name) or name in known or name in TYRO:
            continue
        if name in alone:
            return f"{name} is no flag: what it names comes first, by itself"
        near = [ALIASES[name]] if ALIASES.get(name) in known else []
        near += difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        return f"flag {name} is unknown" + (f": did you mean {near[0]}?" if near else "")
    return ""


def in_one_line(box: str) -> str:
    """What a box of tyro's says between its title and its next rule, without the frame."""
    lines = [line.strip() for line in _FRAME.sub("", box).strip().splitlines()[1:]]
    said = dropwhile(lambda line: not line, lines)  # without UTF-8 a rule is under the title
    return " ".join(takewhile(bool, said))


def conclude(main: Callable[[], int]) -> int:
    """The exit status of a command, also of one that is interrupted or cannot write any more."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGTERM, _end)  # cleans up on the way out, as after Ctrl-C
    try:
        status = main()
        _flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return _unread()
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every command imports
            raise
        print(f"error: memory ran out: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is not None:
            raise
        print(f"error: {error}", file=sys.stderr)  # of a stream, or in words of its own
        with contextlib.suppress(OSError):
            _flush()
        return 1


def _flush() -> None:
    """Hand on what was printed; OSError says that it was standard output."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise OSError(f"standard output cannot be written: {error}") from error


def _unread() -> int:
    """The status where `| head` has read enough; what is still to be written goes nowhere."""
    discard(sys.stdout)
    return 128 + signal.SIGPIPE


def discard(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: it would fail once more at the exit."""
    with contextlib.suppress(OSError):  # in memory, it has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)
