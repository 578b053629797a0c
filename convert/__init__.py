"""Checkpoints of other programs; installed as `mlx_redrafter.convert`.

Apple's drafter folders (`config.json` and `model.safetensors` with Apple's tensor names) need no
conversion: `mlx_redrafter.drafters` loads them as they are. Readers and writers of other formats
belong here; none is read or written yet.
"""
