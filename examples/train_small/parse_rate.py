"""The share of completions of held-out function headers that Python parses.

    python parse_rate.py DATA MODEL [--functions 200] [--temp 0.2] [--out FILE]

Each prompt is a function's header alone (`def name(...):`, methods too, moved to the margin). The completion is cut
where the function ends: at the first line that stands further left than its body. One that has not ended after
--max-tokens is cut at its last line end, and counted as it then is. --out writes every function as a line of JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from bits_per_byte import read
from build_data import draw
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from rodimus_mlx import load
from rodimus_mlx.generation import encode_prompt

PER_MODULE = 4  # headers from one module at most
BODY_LINES = 3  # of a function worth asking for
LONGEST_HEADER = 300  # characters
TOGETHER = 32  # completions at once
LOOK_EVERY = 4  # tokens: a completion that is over is found and taken out of the batch
INSIDE = ")]}#"  # closing brackets and comments may stand further left inside a function


def main() -> None:
    """Print the shares as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of heldout.jsonl")
    parser.add_argument("model", help="folder of a Rodimus or Rodimus+ model")
    parser.add_argument("--functions", type=int, default=200)
    parser.add_argument("--temp", type=float, default=0.2)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the completions here")
    args = parser.parse_args()

    prompts = headers(read(args.data / "heldout.jsonl"), args.functions)
    model, tokenizer = load(args.model)
    mx.random.seed(args.seed)
    completions = complete(model, tokenizer, prompts, args.max_tokens, args.temp)
    results = [judge(header, *completion) for header, completion in zip(prompts, completions)]
    if args.out:
        args.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    share = {name: sum(r[name] for r in results) / len(results) for name in ("parses", "ended", "does_something")}
    print(json.dumps({"functions": len(results), "temperature": args.temp, **share}))


def headers(records: list[dict[str, str]], count: int) -> list[str]:
    """Headers of held-out functions, chosen by hash, no two alike."""
    found: dict[str, float] = {}
    for record in records:
        own = sorted(set(functions(record["text"])), key=lambda header: draw(record["path"] + header))
        for header in own[:PER_MODULE]:
            found[header] = draw(header)
    chosen = sorted(found, key=lambda header: found[header])[:count]
    if len(chosen) < count:
        raise SystemExit(f"Error: the held-out modules give {len(chosen)} headers, not {count}; lower --functions")
    return chosen


def functions(text: str) -> Iterator[str]:
    """The headers of a module's functions, without decorators, at the margin."""
    lines = text.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        begin, body = node.lineno - 1, node.body[0].lineno - 1
        header = textwrap.dedent("\n".join(lines[begin:body])).rstrip()
        if (
            body > begin
            and node.end_lineno - body >= BODY_LINES
            and header.endswith(":")
            and len(header) < LONGEST_HEADER
        ):
            yield header


def complete(
    model: Any, tokenizer: Any, headers: Sequence[str], max_tokens: int, temp: float
) -> Iterator[tuple[str, bool]]:
    """What the model adds to each header, cut at the function's end, and whether it has one; by mlx-lm's batches."""
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        sampler=make_sampler(temp),
        completion_batch_size=TOGETHER,
        prefill_batch_size=TOGETHER,
    )
    uids = generator.insert([encode_prompt(model, tokenizer, header) for header in headers])
    made: dict[int, list[int]] = {uid: [] for uid in uids}
    stopped = set()
    while responses := generator.next_generated():
        over = []
        for each in responses:
            if each.finish_reason == "stop":
                stopped.add(each.uid)
                continue
            made[each.uid].append(each.token)
            looked_at = each.finish_reason is None and len(made[each.uid]) % LOOK_EVERY == 0
            if looked_at and function_end(tokenizer.decode(made[each.uid])) is not None:
                over.append(each.uid)
        if over:
            generator.remove(over)
    generator.close()
    for uid in uids:
        yield cut(tokenizer.decode(made[uid]), ended=uid in stopped)


def cut(text: str, *, ended: bool = False) -> tuple[str, bool]:
    """A completion up to the function's end, and whether it has one; ``ended``: the model ended the whole text."""
    end = function_end(text)
    if end is not None:
        return text[:end], True
    return (text, True) if ended else (text[: text.rfind("\n") + 1], False)


def function_end(text: str) -> int | None:
    """Where the first line begins that stands further left than the body; None if there is none yet."""
    body, begin = None, 0
    for number, line in enumerate(text.splitlines(keepends=True)):
        code = line.lstrip(" \t")
        indent = len(line) - len(code)
        if number and code and body is not None and indent < body and code[0] not in INSIDE + "\n":
            return begin
        if body is None and code.strip():
            body = indent if number else 1  # on the header's own line: what is indented at all may go on with it
        begin += len(line)
    return None


def judge(header: str, body: str, ended: bool) -> dict[str, Any]:
    """Whether header and body parse, and have more than a docstring or `pass` in them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function = ast.parse(header + body).body[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"header": header, "body": body, "parses": False, "ended": ended, "does_something": False}
    idle = all(
        isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in function.body
    )
    return {"header": header, "body": body, "parses": True, "ended": ended, "does_something": not idle}


if __name__ == "__main__":
    main()
