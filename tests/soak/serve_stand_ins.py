"""`rpt serve` with stand-in servers, which start in a second. The supervisor is the same.

Usage: python serve_stand_ins.py MODEL LOG_FOLDER PORT...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from transformers import AutoConfig

from rpt_lightning.rollout.servers.agreement import PROTOCOL, architecture
from rpt_lightning.rollout.servers.key import KEY_VARIABLE
from rpt_lightning.rollout.servers.processes import Servers, ServerSpec

SCRIPT = Path(__file__).resolve().parents[1] / "integration" / "stand_in_server.py"


def main(model: str, log_folder: str, ports: list[str]) -> None:
    facts = {
        "protocol": PROTOCOL,
        "dtype": "float32",
        "max_model_len": 256,
        "logprobs_mode": "processed_logprobs",
        "prefix_block_size": 16,
    }
    facts["architecture"] = architecture(AutoConfig.from_pretrained(model))
    specs = [
        ServerSpec(
            url=f"http://127.0.0.1:{port}",
            command=(sys.executable, str(SCRIPT), "--port", port, "--facts", json.dumps(facts)),
            devices=None,
            log_file=Path(log_folder) / f"server-{port}.log",
        )
        for port in ports
    ]
    Servers(specs, key=os.environ[KEY_VARIABLE], restart=True, hung_s=900.0).run(ready_timeout_s=120)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
