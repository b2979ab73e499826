"""Three users of one server share a batch: one has the base, one the adapter, one the adapter from the 7th token on.

``python examples/steer_a_batch.py`` prints which tokens differ from the base's::

    base           . . . . . . . . . . . .
    adapter        # # # # # # # # # # # #
    adapter later  . . . . . . # # # # # #
"""

from __future__ import annotations

import torch
import transformers

from surgery import apply_surgery, sites, steer

torch.manual_seed(0)
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
config = transformers.Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=16, **sizes)
model = apply_surgery(transformers.Qwen3ForCausalLM(config).eval(), "antipasto", r=32, progress=False)
with torch.no_grad():
    for site in sites(model).values():
        site.core.g.normal_(std=0.5)  # in place of training

text = torch.randint(0, 256, (1, 12)).repeat(3, 1)
coeff = torch.zeros(3, 12)
coeff[1] = 1.0
coeff[2, 6:] = 1.0
with torch.no_grad():
    with steer(model, 0.0):
        base = model(input_ids=text).logits
    with steer(model, coeff):
        steered = model(input_ids=text).logits

moved = (steered - base).abs().amax(-1)  # of each token, by row
for name, row in zip(("base", "adapter", "adapter later"), moved, strict=True):
    print(f"{name:14}", " ".join("#" if change > 1e-4 else "." for change in row.tolist()))
