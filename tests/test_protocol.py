import json
import subprocess
import sys
from types import ModuleType

import onlooker.protocol

HEAVY = ("torch", "transformers", "accelerate", "cv2", "av", "pydantic", "rich", "typer", "numpy", "asyncio")

IMPORT = """
import json, resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import onlooker.protocol
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"modules": sorted(sys.modules), "grown_kib": grown}))
"""


def test_all_names_what_can_be_imported() -> None:
    public = {
        name
        for name, value in vars(onlooker.protocol).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(onlooker.protocol.__all__) == public
    assert len(onlooker.protocol.__all__) == len(public)


def test_importing_the_protocol_loads_nothing_heavy() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    facts = json.loads(run.stdout)
    assert set(HEAVY).isdisjoint(facts["modules"])
    assert facts["grown_kib"] < 20 << 10
