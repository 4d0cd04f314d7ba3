"""How well a model predicts a text, and what another one, usually its quantized form, makes different."""
