"""A request's JSON, checked and made simple before mlx-lm's handler sees it.

That handler would load any model that a request names, fetch any image, and let sampling options of the wrong size
end the thread that generates for everybody.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from .errors import ApiError

# What mlx-lm's handler may read; everything else is dropped, unless it is in _UNSUPPORTED.
_PASSED = {
    "model",
    "messages",
    "prompt",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "presence_context_size",
    "frequency_penalty",
    "frequency_context_size",
    "xtc_probability",
    "xtc_threshold",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "seed",
    "stop",
    "state",
    "suffix",
}
# What a client would notice the lack of, and the values that mean nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "chat_template_kwargs": ({},),
    "adapters": (),
    "draft_model": (),
}
# Beyond these nobody samples, but numbers of any size would reach the arrays.
_RANGES = {
    "temperature": (0, 100),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "repetition_context_size": (0, 100_000),
    "presence_context_size": (0, 100_000),
    "frequency_context_size": (0, 100_000),
}
COLDEST = 1e-4  # temperatures below are 0: 1/T must be finite in float32
_MOST_STOPS = 16
_LONGEST_STOP = 1000


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request, without its nulls.

    Raises:
        ApiError: it is none, or holds numbers that JSON does not have.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ApiError(400, "the request's JSON is nested too deeply") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise ApiError(400, f"the request is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the request must be a JSON object")
    return {key: value for key, value in body.items() if value is not None}


def check_body(
    body: dict[str, Any], *, chat: bool, names: set[str], vocab_size: int, most_tokens: int
) -> dict[str, Any]:
    """The part of a completion request that mlx-lm's handler gets.

    Args:
        chat: whether it must have messages rather than a prompt.
        names: what the model may be called.
        vocab_size: of the model.
        most_tokens: the most that may be asked for.

    Raises:
        ApiError: naming the field that is wrong.
    """
    for field, harmless in _UNSUPPORTED.items():
        if field in body and body[field] not in harmless:
            _refuse(f"{field} is not supported", field)
    passed = {key: value for key, value in body.items() if key in _PASSED}
    model = passed.get("model", "default_model")
    if not isinstance(model, str) or model not in names:
        raise ApiError(404, f"there is no model {_shown(model)}", param="model", code="model_not_found")
    if chat:
        passed["messages"] = _messages(body.get("messages"))
        passed.pop("prompt", None)
        if passed.pop("suffix", ""):
            _refuse("suffix goes with a prompt, not with messages", "suffix")
    else:
        passed["prompt"] = _prompt(body.get("prompt"))
        passed.pop("messages", None)
        if not isinstance(passed.get("suffix", ""), str):
            _refuse("suffix must be a text", "suffix")
        if passed.get("suffix") and not isinstance(passed["prompt"], str):
            _refuse("with a suffix, prompt must be a text", "prompt")
    if not isinstance(passed.get("state", ""), str):
        _refuse("state must be the name of a state", "state")
    if "stream_options" in passed:
        wanted = passed["stream_options"]
        if not isinstance(wanted, dict):
            _refuse("stream_options must be an object", "stream_options")
        passed["stream_options"] = {"include_usage": wanted.get("include_usage") is True}
    passed["stop"] = _stops(passed.get("stop", []))
    _check_numbers(passed, vocab_size, most_tokens)
    return passed


def _check_numbers(passed: dict[str, Any], vocab_size: int, most_tokens: int) -> None:
    """Types and simple ranges are mlx-lm's to check; here is what it does not see."""
    for field, value in passed.items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(f"{field} must be a finite number", field)
        if isinstance(value, bool) and field not in ("stream", "logprobs"):
            _refuse(f"{field} must not be a boolean", field)
    for field, (low, high) in _RANGES.items():
        if isinstance(value := passed.get(field), (int, float)) and not low <= value <= high:
            _refuse(f"{field} must be at {'least' if value < low else 'most'} {low if value < low else high}", field)
    if isinstance(value := passed.get("temperature"), (int, float)) and value < COLDEST:
        passed["temperature"] = 0
    for field in ("max_tokens", "max_completion_tokens"):
        if isinstance(passed.get(field), int) and passed[field] > most_tokens:
            _refuse(f"{field} must be at most {most_tokens}", field)
    if isinstance(passed.get("top_k"), int) and passed["top_k"] >= vocab_size:
        passed["top_k"] = 0  # no restriction; mlx-lm fails at it while sampling
    for field in ("xtc_probability", "xtc_threshold"):
        if isinstance(passed.get(field), int):
            passed[field] = float(passed[field])
    if isinstance(passed.get("seed"), int):
        passed["seed"] %= 2**64
    bias = passed.get("logit_bias", {})
    if not isinstance(bias, dict):
        _refuse("logit_bias must be an object of token ids and numbers", "logit_bias")
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 20 and int(key) < vocab_size):
            _refuse(f"logit_bias: there is no token {_shown(key)}", "logit_bias")
        if not isinstance(value, (int, float)) or not -100 <= value <= 100:
            _refuse("logit_bias: values must be from -100 to 100", "logit_bias")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        _refuse("messages must be a list with at least one message", "messages")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        _refuse(f"{where} must be an object with a role", "messages")
    content = value.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            _refuse(f"{where}: only text content is supported", "messages")
        content = "".join(parts)  # type: ignore[arg-type]
    if content is None:
        content = ""
    if not isinstance(content, str):
        _refuse(f"{where}: content must be text", "messages")
    role = "system" if value["role"] == "developer" else value["role"]
    return {"role": role, "content": content}


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return value
    _refuse("prompt must be one text, or a list of token ids", "prompt")


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        _refuse("stop must be a text or a list of texts", "stop")
    if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
        _refuse(f"stop may have at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} characters", "stop")
    return [stop for stop in stops if stop]


def _refuse(message: str, param: str) -> NoReturn:
    raise ApiError(400, message, param=param)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
