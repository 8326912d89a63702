"""Tables, goals and sentences from what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...common import table
from ..kit import number

FAIR_GOALS = ((2048, 0.995), (1024, 0.97))  # tokens a rank and more: share of fair, where the placement gap is 0
TRANSFER_GOALS = {("pull_ms", "bfloat16"): 0.57, ("push_ms", "bfloat16"): 0.65, ("push_ms", "float32"): 0.8}  # V3, 2 copies a rank
PLAIN_GOAL = 0.995   # speed of the layer without replicas beside plain torch
EMPTY_GOAL = 0.01    # milliseconds that an empty slot costs a micro-batch


def percent(share: dict[str, float] | None, interval: bool = True) -> str:
    if share is None:
        return ""
    text = f"{100 * share['ratio']:.1f}%"
    return f"{text} ({100 * share['low']:.1f} to {100 * share['high']:.1f})" if interval else text


def case_table(case: dict[str, Any]) -> str:
    """The policies of one case."""
    header = ["policy", "p50 ms", "p99 ms", "sustained ms", "of forced", "of fair (95%)", "over packed (95%)", "max/mean", "peak MB"]
    rows = [[name, number(arm["p50_ms"]), number(arm["p99_ms"]), number(arm.get("sustained_ms")), percent(arm.get("of_forced"), False),
             percent(arm.get("of_fair")), percent(arm.get("over_packed")), f"{arm['imbalance']:.3f}", number(arm.get("peak_mb"))]
            for name, arm in case["arms"].items()]
    lines = [table(header, rows)]
    if "step" in case:
        each = ", ".join(f"{name} {number(ms)}" for name, ms in case["step"]["ms"].items())
        lines.append(f"a step of {case['step']['micro_batches']} micro-batches with push, SGD and pull, ms: {each}")
    for name, plan in case.get("plan", {}).items():
        arm = case["arms"][name]
        lines.append(f"{name}: a plan takes {number(plan['gpu_us'])} us in a row, {number(plan['host_us'])} us of the host; placement gap "
                     f"{100 * arm['placement_gap']:.2f}% on average, 0 in {arm['without_gap']} of {case['micro_batches']} micro-batches")
    return "\n".join(lines)


def summary_table(cases: list[dict[str, Any]]) -> str:
    """p50 of all cases and policies."""
    names = list(dict.fromkeys(name for case in cases for name in case["arms"]))
    rows = [[f"{case['case']}, {case['tokens']:,}", *(number(case["arms"].get(name, {}).get("p50_ms")) for name in names)]
            for case in cases]
    return table(["case, tokens a rank; p50 ms", *names], rows)


def transfers_table(transfers: dict[str, dict[str, Any]]) -> str:
    header = ["copies", "pull ms", "hidden", "push ms", "hidden", "pull MB", "push MB", "slots MB"]
    rows = [[f"{name}, {slots}", number(one["pull_ms"]), _signed(one.get("pull_hidden_ms")), number(one["push_ms"]),
             _signed(one.get("push_hidden_ms")), *(number(one[key] / 1e6) for key in ("pull_bytes", "push_bytes", "slots_bytes"))]
            for name, by_slots in transfers.items() for slots, one in by_slots.items()]
    return table(header, rows) + "\nhidden: what is left of it on a side stream beside products of matrices that take twice as long"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def emulated_table(cases: list[dict[str, Any]]) -> str:
    header = ["case, ranks, tokens a rank", "policy", "experts ms", "modelled dispatch ms", "step ms", "of fair", "over packed", "max/mean",
              "gap"]
    rows = []
    for case in cases:
        steps = {name: step_ms(arm) for name, arm in case["arms"].items()}
        for name, arm in case["arms"].items():
            gap = f"{100 * arm['gap']:.1f}%" if "gap" in arm else ""
            rows.append([f"{case['case']}, {case['ranks']}, {case['tokens']:,}", name, number(arm["compute_ms"]),
                         number(arm["dispatch_ms"]), number(steps[name]),
                         *(f"{100 * steps[other] / steps[name]:.1f}%" for other in ("fair", "packed")),
                         f"{arm['imbalance']:.3f}", gap])
    return table(header, rows) + (
        "\nexperts: each rank's work on this device one after another, the maximum taken. Dispatch is modelled: the busiest rank's rows "
        f"four times over {cases[0]['bandwidth_gb_s']:g} GB/s.\nA step is both, and for lplb its plan, without the exchange of counts.")


def pieces_table(cases: list[dict[str, Any]]) -> str:
    """Milliseconds by kind of kernel."""
    seen = [(f"{case['case']}, {case['tokens']:,}, {name}", found) for case in cases for name, found in case.get("pieces_ms", {}).items()]
    kinds = list(dict.fromkeys(kind for _, found in seen for kind in found))
    if not seen:
        return ""
    return table(["ms of GPU time", *(title for title, _ in seen)],
                 [[kind, *(f"{found.get(kind, 0):.2f}" for _, found in seen)] for kind in kinds])


def emulated_sentences(cases: list[dict[str, Any]]) -> list[str]:
    """What lplb gives beside packed homes, by ranks."""
    found = []
    for name, tokens in dict.fromkeys((case["case"], case["tokens"]) for case in cases):
        same = [case for case in cases if (case["case"], case["tokens"]) == (name, tokens)]
        for arm in (arm for arm in same[0]["arms"] if arm.startswith("lplb")):
            gains = [f"{100 * (step_ms(case['arms']['packed']) / step_ms(case['arms'][arm]) - 1):+.1f}% on {case['ranks']} ranks"
                     for case in same if arm in case["arms"]]
            found.append(f"{name}, {tokens:,} tokens a rank, emulated: speed of {arm} beside packed homes {', '.join(gains)}; "
                         "pull and push of copies are not in it.")
    return found


def step_ms(arm: dict[str, float]) -> float:
    return arm["compute_ms"] + arm["dispatch_ms"] + arm["plan_us"] / 1000


def compare_table(compared: list[dict[str, Any]]) -> str:
    rows = [[f"{one['case']}, {one['tokens']:,}", number(one["plain_p50_ms"]), number(one["none_p50_ms"]), percent(one["speed"])]
            for one in compared]
    return table(["case, tokens a rank", "plain torch, p50 ms", "lplb without replicas", "speed (95%)"], rows)


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal that times on GPUs can be held against; those of CPUs are not judged. met None: there is nothing to judge."""
    if result["device"] != "cuda":
        return []
    return [{"goal": goal, "measured": measured, "met": met} for goal, measured, met in _goals(result)]


def _goals(result: dict[str, Any]) -> Iterator[tuple[str, str, bool | None]]:
    for case in result["cases"]:
        where = f"{case['case']}, {case['tokens']:,} tokens a rank"
        for name, arm in case["arms"].items():
            least = next((share for tokens, share in FAIR_GOALS if case["tokens"] >= tokens), None)
            if name.startswith("lplb") and least and "of_fair" in arm:
                share = arm.get("of_fair_without_gap")
                yield (f"{where}: {name} reaches {100 * least:g}% of fair where the placement gap is 0",
                       percent(share) if share else "no micro-batch has a gap of 0", share["ratio"] >= least if share else None)
            if name.startswith("empty") and "packed" in case["arms"]:
                slots = int(name.split("S")[1])
                cost = (arm["mean_ms"] - case["arms"]["packed"]["mean_ms"]) / slots
                yield f"{where}: an empty slot costs at most {EMPTY_GOAL} ms", f"{cost:.3f} ms", cost <= EMPTY_GOAL
    for name, by_slots in result["transfers"].items():
        for slots, one in by_slots.items():
            for (what, dtype), most in TRANSFER_GOALS.items():
                if name.startswith("v3-32") and slots == f"S2 {dtype}":
                    goal = f"{name}: {what[:4]} of 2 copies a rank, {dtype}, takes at most {most} ms"
                    yield goal, f"{one[what]:.2f} ms", one[what] <= most
    for one in result["compared"]:
        yield (f"{one['case']}, {one['tokens']:,} tokens a rank: without replicas within 0.5% of plain torch", percent(one["speed"]),
               one["speed"]["ratio"] >= PLAIN_GOAL)


def goals_text(found: list[dict[str, Any]]) -> str:
    words = {True: "met   ", False: "MISSED", None: "-     "}
    lines = [f"{words[one['met']]} {one['goal']}: {one['measured']}" for one in found]
    judged = [one for one in found if one["met"] is not None]
    return "\n".join([*lines, f"{sum(one['met'] for one in judged)} of {len(judged)} goals met."])


def break_even(result: dict[str, Any], step: int) -> list[str]:
    """A sentence for each model and number of slots: from how many tokens a rank on lplb beats packed homes, transfers paid for."""
    found = []
    for name in dict.fromkeys(case["case"] for case in result["cases"]):
        cases = sorted((case for case in result["cases"] if case["case"] == name and "packed" in case["arms"]),
                       key=lambda case: case["tokens"])
        for arm in dict.fromkeys(arm for case in cases for arm in case["arms"] if arm.startswith("lplb")):
            slots = arm.split(" ")[1]
            costs = [one for key, one in result["transfers"].get(name, {}).items() if key.startswith(slots)]
            cost = costs[0]["pull_ms"] + costs[0]["push_ms"] if costs else 0.0
            points = [(case["tokens"], case["arms"]["packed"]["mean_ms"] - case["arms"][arm]["mean_ms"],
                       case["arms"]["packed"]["mean_ms"]) for case in cases]
            found.append(_sentence(f"{name}, {arm} on {result['ranks']} ranks", points, cost, step))
    return found


def _sentence(what: str, points: list[tuple[int, float, float]], cost: float, step: int) -> str:
    """points: (tokens a rank, milliseconds won a micro-batch, milliseconds of packed); cost: of a step's transfers."""
    least = crossing([(tokens, gain - cost / step) for tokens, gain, _ in points])
    with_cost = f"with {step} micro-batches a step, whose pull and push take {cost:.2f} ms"
    if least is None:
        measured = " or ".join(f"{tokens:,}" for tokens, _, _ in points)
        head = f"{what}: {with_cost}, lplb does not beat packed homes at {measured} tokens a rank"
    elif least <= points[0][0]:
        head = f"{what}: {with_cost}, lplb beats packed homes from the smallest measured size on, {points[0][0]:,} tokens a rank"
    else:
        head = f"{what}: {with_cost}, lplb beats packed homes from about {least:,.0f} tokens a rank on"
    each = []
    for tokens, gain, packed in points:
        enough = f"pays from {max(1, int(-(-cost // gain)))} micro-batches a step on" if gain > 0 else "never pays"
        each.append(f"{tokens:,}: {100 * gain / packed:+.1f}% a micro-batch, {enough}")
    return f"{head} ({'; '.join(each)})."


def crossing(points: list[tuple[int, float]]) -> float | None:
    """Where the second numbers become and stay positive, on straight lines between the points; None where the last is not."""
    if not points or points[-1][1] <= 0:
        return None
    least = float(points[-1][0])
    for (x0, y0), (x1, y1) in reversed(list(zip(points, points[1:]))):
        if y0 <= 0:
            return x0 + (x1 - x0) * -y0 / (y1 - y0)
        least = float(x0)
    return least
