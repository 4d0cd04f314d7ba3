"""An OpenAI-compatible server: mlx-lm's, bent where ours differs.

checks.py refuses bad requests before they reach mlx-lm, generator.py lets mlx-lm's batches go on from named states,
handler.py speaks HTTP, server.py starts and ends it all, page/ is the web page at ``/``.
"""
