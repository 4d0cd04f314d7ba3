"""Serve a model to OpenAI clients, and be such a client.

    python serve_and_call.py [MODEL]

The server alone is: rodimus-mlx serve --model MODEL. The client is OpenAI's (pip install openai), or else plain urllib.
"""

import json
import sys
import threading
import urllib.request

from rodimus_mlx import load
from rodimus_mlx.loading import DEMO_FOLDER
from rodimus_mlx.serve.server import Server


def call_openai(url: str) -> None:
    """A streamed completion, one that fills in the middle, and a chat, by OpenAI's own client."""
    from openai import OpenAI

    with OpenAI(base_url=url, api_key="mine") as client:
        for chunk in client.completions.create(model="small", prompt="def add(a, b):", max_tokens=20, stream=True):
            print(chunk.choices[0].text, end="", flush=True)
        filled = client.completions.create(model="small", prompt="x = [", suffix="]\n", max_tokens=20)
        print(f"\nx = [{filled.choices[0].text}]")
        question = {"role": "user", "content": "What is a list?"}
        answer = client.chat.completions.create(model="small", messages=[question], max_tokens=20)
        print(answer.choices[0].message.content)


def call_plainly(url: str) -> None:
    """A completion by nothing but HTTP and JSON."""
    body = {"model": "small", "prompt": "def add(a, b):", "max_tokens": 20}
    headers = {"Authorization": "Bearer mine", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        print(json.load(answer)["choices"][0]["text"])


def main() -> None:
    model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else DEMO_FOLDER)
    server = Server(model, tokenizer, model_name="small", port=0, api_key="mine")  # port 0: any free one
    threading.Thread(target=server.serve_forever).start()
    print(f"Serving at {server.url}")
    try:
        call_plainly(f"{server.url}v1")
        call_openai(f"{server.url}v1")
    except ImportError:
        print("For more, install the client: pip install openai")
    finally:
        server.end(5)


if __name__ == "__main__":
    main()
