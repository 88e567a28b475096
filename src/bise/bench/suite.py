"""One benchmark from options to results: which cases, which engines, in what order, told as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bise.bench.engine_bench import BiseContestant, engine_step_seconds
from bise.bench.limits import ArithmeticProbe, ReadProbe, measure_limits
from bise.bench.peers import PeerContestant, PeerSpec, start_peer
from bise.bench.report import limits_fields, limits_text, result_of, with_ratios
from bise.bench.roofline import op_rows, op_work
from bise.bench.rounds import (
    Case,
    Meters,
    PeerError,
    Series,
    busy_seconds,
    energy_joules,
    run_rounds,
    wait_until_idle,
)
from bise.config import ModelConfig
from bise.engine.memory import STEP_TOKENS
from bise.errors import ConfigError
from bise.model.source import ModelSource
from bise.plan import MachineLimits, Work, decode_work, prefill_work, shape_source

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    quant: str
    kv: str
    threads: int
    prompts: tuple[int, ...]
    """Lengths of the prompts whose reading is timed."""
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    """Depths at which decoding is timed."""
    gen: int
    """Decoding steps per turn; 0 measures no decoding."""
    rounds: int
    wait_s: float
    """How long to wait for an idle machine before each case, at most."""
    budget_s: float
    """No round of a case starts after so many seconds of turns."""

    def __post_init__(self) -> None:
        for name in ("prompts", "batches", "contexts"):
            if any(value < 1 for value in getattr(self, name)):
                raise ConfigError(f"{name} must be positive numbers", field=name)
        if self.rounds < 1 or self.gen < 0:
            raise ConfigError("--rounds must be at least 1 and --gen at least 0", field="rounds")

    def cases(self) -> list[Case]:
        """Return every case in order of measurement."""
        found = [Case(op="prefill", prompt=length, batch=1, context=0, steps=0) for length in self.prompts]
        if self.gen:
            found += [
                Case(op="decode", prompt=0, batch=batch, context=context, steps=self.gen)
                for context in self.contexts
                for batch in self.batches
            ]
        return found


def altered_shape(source: ModelSource, window: int | None, layers: int | None) -> ModelSource:
    """Return a shape with a sliding window in every layer, or with so many of its layers; the name tells."""
    config, name = source.config, source.name
    if layers is not None:
        config = replace(config, num_layers=layers, windows=(config.windows * layers)[:layers])
        name += f"-{layers}-layers"
    if window is not None:
        config = replace(config, windows=(window,) * config.num_layers)
        name += f"-w{window}"
    return source if config is source.config else shape_source(name, config)


def run_bench(
    source: ModelSource, peers: Sequence[PeerSpec], options: BenchOptions, tell: Tell
) -> dict[str, Any]:
    """Measure everything; returns the document without its provenance. `tell` gets lines for people."""
    probe = ReadProbe(options.threads)
    skipped: list[str] = []
    contestants: list[BiseContestant | PeerContestant] = [
        BiseContestant(source, quant=options.quant, kv=options.kv, threads=options.threads)
    ]
    tell("weights are ready")
    try:
        for spec in peers:
            try:
                peer = start_peer(spec, source, quant=options.quant, threads=options.threads)
            except PeerError as error:
                skipped.append(f"{spec.name} skipped: {error}")
                tell(skipped[-1])
                continue
            contestants.append(peer)
            tell(f"{peer.name} {peer.version} is ready")
        wait_until_idle(options.wait_s)  # a peer that just loaded may still be at work
        limits = measure_limits(options.threads, probe)
        tell(f"this machine, {options.threads} threads: {limits_text(limits)}")
        results = _results(contestants, source.config, options, limits, probe, skipped, tell)
        own = contestants[0]
        assert isinstance(own, BiseContestant)
        ops = _ops(own, options, limits)
    finally:
        for contestant in contestants:
            if isinstance(contestant, PeerContestant):
                contestant.close()
    return {
        "model": source.name or str(source.path),
        "quant": options.quant,
        "kv": contestants[0].kv_format,
        "limits": limits_fields(limits),
        "engine_step_us": 1e6 * engine_step_seconds(source.config),
        "skipped": skipped,
        "ops": ops,
        "results": results,
    }


def _ops(own: BiseContestant, options: BenchOptions, limits: MachineLimits) -> list[dict[str, Any]]:
    """Return where the time goes, op by op: one prompt of at most a step, and decoding after it."""
    steps = max(1, min(options.gen, 16))
    room = own.config.max_context - steps - 64
    if room < 1:
        return []
    prompt = min([*options.prompts, STEP_TOKENS, room])
    prefill, decode = own.step_seconds(prompt=prompt, steps=steps)
    return [
        entry
        for phase, seconds, rows, depth in (("prefill", prefill, prompt, 0), ("decode", decode, 1, prompt))
        for entry in op_rows(
            seconds,
            op_work(own.config, own.formats, own.kv_format, rows=rows, depth=depth),
            limits,
            phase,
            own.kv_format,
        )
    ]


def _results(
    contestants: Sequence[BiseContestant | PeerContestant],
    config: ModelConfig,
    options: BenchOptions,
    limits: MachineLimits,
    probe: ReadProbe,
    skipped: list[str],
    tell: Tell,
) -> list[dict[str, Any]]:
    meters = Meters(
        read_rate=probe,
        busy_seconds=busy_seconds,
        joules=energy_joules,
        arithmetic=ArithmeticProbe(options.threads),
    )
    by_name = {contestant.name: contestant for contestant in contestants}
    results: list[dict[str, Any]] = []
    for number, case in enumerate(options.cases()):
        share = wait_until_idle(options.wait_s)
        if share is not None and share >= 0.08:
            tell(f"other processes use {share:.2f} cores: expect noisy rounds")
        measured, missing = run_rounds(
            case,
            contestants,
            options.rounds,
            meters,
            warm_up=number == 0 or case.op == "decode",
            budget_s=options.budget_s,
        )
        for line in missing:
            skipped.append(line)
            tell(line)
        for series in measured:
            entry = result_of(series, _work(by_name[series.contestant], config, series), limits)
            results.append(entry)
            tell(f"{case.op} {case.prompt or case.context} x{case.batch}: {series.contestant} "
                 f"{entry['tokens_per_s']:.1f} tok/s")  # fmt: skip
    return with_ratios(results)


def _work(contestant: BiseContestant | PeerContestant, config: ModelConfig, series: Series) -> Work:
    case = series.case
    if case.op == "prefill":
        return prefill_work(config, contestant.formats, prompt=case.prompt)
    depth = case.context + case.steps * (len(series.turns) + 2) // 2  # the middle turn's
    return decode_work(config, contestant.formats, contestant.kv_format, batch=case.batch, context=depth)
