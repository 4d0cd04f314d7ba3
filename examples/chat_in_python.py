"""Talk with a chat model from Python: each turn reads only what is new, and going back costs nothing.

    python chat_in_python.py [MODEL]

With codefuse-ai/Rodimus-Plus-Coder-1.6B-Chat it answers; the bundled model was never taught to and babbles.
"""

import sys

from rodimus_mlx import load
from rodimus_mlx.chat import Chat
from rodimus_mlx.loading import DEMO_FOLDER


def ask(chat: Chat, question: str) -> None:
    """Print a question, and its answer as it comes."""
    print(f"> {question}")
    for piece in chat.ask(question):
        print(piece.text, end="", flush=True)
    print("\n")


def main() -> None:
    model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else DEMO_FOLDER)
    chat = Chat(model, tokenizer, system="You answer in one sentence.", max_tokens=60)
    ask(chat, "What is a recurrent neural network?")
    ask(chat, "And what is its state?")

    chat.undo()  # the model goes back to where it was after the first answer
    ask(chat, "Where are they used?")

    chat.switch("other")  # a branch with the same past; the first line of talk stays as it is
    ask(chat, "Say that again, but for a child.")
    chat.switch("main")
    print(f"{len(chat.turns)} turns and {chat.tokens} tokens on the branch {chat.branch}:")
    for message in chat.line.messages:
        print(f"  {message['role']}: {message['content'][:50]!r}")


if __name__ == "__main__":
    main()
