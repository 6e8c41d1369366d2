"""Records layouts of DeepSpeed 0.19.6, the last release that has them, as fixtures.

    python tests/golden/record_layouts.py PATH_TO/deepspeed/ops/sparse_attention/sparsity_config.py

The file is plain torch and needs nothing else of DeepSpeed. Rows are written as hexadecimal numbers, first column highest.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

CASES = [
    ("Dense", dict(), 64), ("Dense", dict(block=8), 40),
    ("Fixed", dict(), 16 * 11), ("Fixed", dict(attention="unidirectional"), 16 * 11),
    ("Fixed", dict(num_local_blocks=6, num_global_blocks=2, horizontal_global_attention=True), 16 * 13),
    ("Fixed", dict(num_different_global_patterns=3, different_layout_per_head=True, attention="unidirectional"), 16 * 10),
    ("Fixed", dict(num_different_global_patterns=4, different_layout_per_head=True), 16 * 9),
    ("Variable", dict(), 16 * 11), ("Variable", dict(attention="unidirectional", num_random_blocks=2), 16 * 11),
    ("Variable", dict(local_window_blocks=[2, 3, 5], global_block_indices=[1, 7], num_random_blocks=1), 16 * 13),
    ("Variable", dict(global_block_indices=[0, 6], global_block_end_indices=[2, 9], horizontal_global_attention=True), 16 * 11),
    ("Variable", dict(num_random_blocks=3, different_layout_per_head=True, attention="unidirectional"), 16 * 12),
    ("BigBird", dict(), 16 * 11), ("BigBird", dict(attention="unidirectional"), 16 * 11),
    ("BigBird", dict(num_random_blocks=3, num_sliding_window_blocks=5, num_global_blocks=2, different_layout_per_head=True), 16 * 12),
    ("BSLongformer", dict(), 16 * 11), ("BSLongformer", dict(attention="unidirectional", global_block_indices=[0, 5]), 16 * 11),
    ("BSLongformer", dict(global_block_indices=[2], global_block_end_indices=[5], num_sliding_window_blocks=5), 16 * 9),
    ("LocalSlidingWindow", dict(), 16 * 11), ("LocalSlidingWindow", dict(attention="bidirectional", num_sliding_window_blocks=5), 16 * 9),
]


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("sparsity_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    records = []
    for number, (name, options, seq_len) in enumerate(CASES):
        random.seed(number)
        layout = getattr(module, f"{name}SparsityConfig")(num_heads=4, **options).make_layout(seq_len)
        rows = [[f"{int(''.join(map(str, row)), 2):x}" for row in head] for head in layout.tolist()]
        records.append({"name": name, "options": options, "seq_len": seq_len, "seed": number, "heads": rows})
    target = Path(__file__).with_name("deepspeed_layouts.json")
    target.write_text(json.dumps({"deepspeed": "0.19.6", "layouts": records}, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
