"""The Hub that tests talk to: a server in this process, in place of huggingface.co. Import it before anything else."""

import os
import tempfile

from hub_server import HubServer

TOKENS = {"me": "hf_me", "reader": "hf_reader", "other": "hf_other"}

HUB = HubServer().start()
HUB.add_user("me", TOKENS["me"])
HUB.add_user("me", TOKENS["reader"], role="read")
HUB.add_user("other", TOKENS["other"])

# `huggingface_hub` reads these when it is imported.
os.environ.update(
    HF_ENDPOINT=HUB.endpoint,
    HF_HOME=tempfile.mkdtemp(prefix="hf_fedsa_tests_"),
    HF_TOKEN=TOKENS["me"],
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)
