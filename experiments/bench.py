"""python -m experiments.bench [--config=clipcov.py] [--config.key=value ...] [--out=FILE.json] [--quick]
    [--model=NAME] [--full_prompts] [--alone] [--profile=DIR]

How fast the loop is on this machine: rollout, update and step, compiling, memory, shares of what the machine can do at
best; the compiled loop against a host loop on the same weights; slot refill against lock-step batches. Weights are
random, so nearly all completions run to their limit. --model gives the config a published model's shapes. --profile
says which kernels took the time, and leaves a trace for XProf or Perfetto.
"""

import os
import pathlib
import sys
import typing
from collections.abc import Mapping

from absl import app, flags
from ml_collections import config_flags

from configs.models import MODELS
from experiments import config_files

_OUT = flags.DEFINE_string("out", None, "Where the JSON goes; default: bench-<config>.json in the working directory.")
_QUICK = flags.DEFINE_bool("quick", False, "Fewer repeats and shorter measurements: for tests.")
_MODEL = flags.DEFINE_string("model", None, "A model of configs/models.py, whose shapes replace config.model's.")
_FULL = flags.DEFINE_bool("full_prompts", False, "Prompts all as long as data.max_prompt_len_tokens lets them be.")
_ALONE = flags.DEFINE_bool("alone", False, "Neither the host loop nor lock-step batches beside it.")
_PROFILE = flags.DEFINE_string("profile", None, "A folder for traces of a rollout and an update, told by kernel too.")
_REPEATS = flags.DEFINE_integer("repeats", None, "Timed runs of each program at least; default 5, with --quick 2.", 1)
DEFAULT_CONFIG = "clipcov.py"
SHOWN = 12  # kernels of a profile; the JSON has all

Record = Mapping[str, typing.Any]


def with_default_config(argv: list[str]) -> list[str]:
    """The arguments with ``--config=clipcov.py`` unless they name one."""
    named = any(word.lstrip("-").partition("=")[0] == "config" for word in argv[1:])
    return argv if named else [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]


def main(argv: list[str]) -> None:
    """Measures, prints and writes; whatever the user can mend ends in a message that starts "error:"."""
    if argv[1:]:
        raise SystemExit(f"error: unexpected {argv[1]!r}; write --name=value.")
    config = config_files.checked(config_files.CONFIG.value)
    config_files.prepare_host()
    if _MODEL.value is not None:
        if _MODEL.value not in MODELS:
            raise SystemExit(f"error: --model={_MODEL.value}; there are {', '.join(MODELS)}.")
        asked = config_flags.get_override_values(flags.FLAGS["config"])
        config.model.update({k: v for k, v in MODELS[_MODEL.value].items() if f"model.{k}" not in asked})
    if config.model.dtype == "float64":
        os.environ["JAX_ENABLE_X64"] = "1"
    from rl_reason.bench.measure import measure
    from rl_reason.report.console import Display
    from rl_reason.report.files import to_json, write_atomic

    name = config_files.name_of(config_files.resolved(with_default_config(sys.argv)))
    out = pathlib.Path(_OUT.value or f"bench-{name}.json")
    display = Display()

    def write(record: Record) -> None:
        write_atomic(out, to_json({"config": name, **record}, indent=1) + "\n")

    def tell(record: Record) -> None:
        write(record)
        print_bench(display, {"config": name, **record})

    try:
        record = measure(
            config,
            repeats=_REPEATS.value or (2 if _QUICK.value else 5),
            quick=_QUICK.value,
            compare=not _ALONE.value,
            full_prompts=_FULL.value,
            trace=pathlib.Path(_PROFILE.value) if _PROFILE.value else None,
            tell=tell,
            say=display.info,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if "profile" in record:
        write(record)
        for part, profile in record["profile"].items():
            print_profile(display, part, profile)
    display.info(str(out))


def rate(part: Record) -> str:
    """'12.3k tok/s'."""
    from rl_reason.report.console import human

    return f"{human(part['tokens_per_s'])} tok/s"


def rows_of(record: Record) -> list[tuple[str, str, str] | None]:
    """(what, its value, a note) line by line; None is a rule."""
    from rl_reason.report.console import human

    def peak(program: str) -> str:
        size = record["programs"][program]["memory"].get("peak")
        return "?" if size is None else f"{human(size)}B"

    rates = record["rates"]
    rollout, update, step, seconds = (record[name] for name in ("rollout", "update", "step", "compile_seconds"))
    per_decode_step = 1e3 * rollout["median_seconds"] / rollout["decode_steps"]
    alone = seconds["update"]
    flops = f"rollout {human(rollout['model_flops'])}, update {human(update['model_flops'])}"
    moved = f"rollout {human(rollout['model_bytes'])}B, update {human(update['model_bytes'])}B"
    return [
        ("matmul rate", f"{human(rates['matmul_flops_per_s'])}FLOP/s", f"{rates['matmul']['dtype']}, measured"),
        ("copy rate", f"{human(rates['copy_bytes_per_s'])}B/s", "read and written, measured"),
        None,
        ("rollout", rate(rollout), roofline_note(rollout)),
        ("  decode step", f"{per_decode_step:.3g} ms", decode_note(rollout)),
        ("update", rate(update), roofline_note(update)),
        ("step", rate(step), f"{step['median_seconds']:.3g} s, MFU {percent(step['mfu'])}"),
        ("  model FLOPs", human(step["model_flops"]), flops),
        ("  model bytes", f"{human(step['model_bytes'])}B", moved),
        None,
        *comparisons(record),
        ("compile", f"{seconds['step']:.1f} s step", f"rollout {seconds['rollout']:.1f} s, update {alone:.1f} s"),
        ("memory", f"{peak('step')} step", f"rollout {peak('rollout')}, update {peak('update')}, by the compiler"),
        ("", f"{human(record['memory']['process_peak_bytes'])}B host", memory_note(record["memory"])),
    ]


def comparisons(record: Record) -> list[tuple[str, str, str] | None]:
    """The lines on the host loop and on lock-step batches, where they were measured."""
    if "host_loop" not in record:
        return []
    host, refill = record["host_loop"], record["refill"]
    return [
        ("compiled loop", f"x {host['rollout_ratio']:.2f} rollout", host_note(host)),
        ("", f"x {host['step_ratio']:.2f} step", "over the host loop's step"),
        ("slot refill", f"x {refill['ratio']:.2f} rollout", refill_note(refill)),
        ("", f"x {refill['ratio_to_host']:.2f} rollout", f"over the host loop there: {rate(refill['host'])}"),
        None,
    ]


def roofline_note(part: Record) -> str:
    """How near a part came to what the machine can do."""
    return f"{part['median_seconds']:.3g} s, {percent(part['roofline_share'])} of the {part['bound']} roofline"


def host_note(host: Record) -> str:
    """What the compiled loop is compared with."""
    from rl_reason.report.console import human

    call = f"{1e3 * host['seconds_per_call']:.3g} ms a call"
    return f"over a call a token: {human(host['rollout_tokens_per_s'])} tok/s, {call}"


def percent(share: float) -> str:
    """'12%', or '0.34%'."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def decode_note(rollout: Record) -> str:
    """What a decode step holds and moves."""
    from rl_reason.report.console import human

    filled = f"{percent(rollout['slot_occupancy'])} of slots filled"
    return f"{rollout['decode_steps']} steps, {filled}, {human(rollout['bytes_per_decode_step'])}B each"


def refill_note(refill: Record) -> str:
    """Both schedules in a line."""
    from rl_reason.report.console import human

    fast, slow = (human(refill[name]["tokens_per_s"]) for name in ("refill", "lock_step"))
    lengths = f"lognormal lengths, mean {refill['mean_length']:.1f} of {refill['limit']}"
    return f"over lock-step batches: {fast}, {slow} tok/s; {lengths}"


def memory_note(memory: Record) -> str:
    """The devices' own count, where they keep one."""
    from rl_reason.report.console import human

    peak = memory["device_peak_bytes"]
    return "resident" if peak is None else f"resident; device peak {human(peak)}B"


def print_bench(display: typing.Any, record: Record) -> None:
    """The table, at most 80 columns wide."""
    import rich.box
    import rich.table
    import rich.text

    machine = record["machine"]
    head = (
        f"{record['config']}: {machine['cpu']}, {machine['cores']} cores; {', '.join(sorted(set(machine['devices'])))}"
    )
    box = rich.box.SIMPLE_HEAD if display.unicode else rich.box.ASCII2
    table = rich.table.Table(box=box, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False, width=80)
    table.add_column("median of runs", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", overflow="fold", style="dim", ratio=1)
    for row in rows_of(record):
        if row is None:
            table.add_section()
        else:
            table.add_row(rich.text.Text(row[0], "bold"), row[1], row[2])
    display.console.print()
    display.console.print(rich.text.Text(f"{head} x {len(machine['devices'])}; jax {machine['versions']['jax']}"))
    model = record["model"]
    what = f"{model['params']:,} parameters, {model['dtype']}; {record['repeats']} runs or more of each"
    display.console.print(rich.text.Text(what, "dim"))
    if (machine["load_average"] or 0) > machine["cores"] / 2:
        display.warn(
            f"load average {machine['load_average']:.1f} at the start: others use this machine, times are too long"
        )
    display.console.print(table)


def print_profile(display: typing.Any, name: str, profile: Record) -> None:
    """The kernels of a traced call that took most of it, at most 80 columns wide."""
    import rich.box
    import rich.table
    import rich.text

    box = rich.box.SIMPLE_HEAD if display.unicode else rich.box.ASCII2
    table = rich.table.Table(box=box, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False, width=80)
    table.add_column(f"{name}, {profile['seconds']:.3g} s, {percent(profile['busy'])} busy", no_wrap=True, ratio=1)
    for column in ("ms", "share", "calls"):
        table.add_column(column, justify="right", no_wrap=True)
    for kernel in profile["kernels"][:SHOWN]:
        share = percent(kernel["seconds"] / profile["seconds"])
        table.add_row(rich.text.Text(kernel["name"]), f"{1e3 * kernel['seconds']:.4g}", share, str(kernel["count"]))
    display.console.print()
    display.console.print(table)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: config_files.parse(with_default_config(argv)))
