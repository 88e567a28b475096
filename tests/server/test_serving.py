"""The process around the server."""

import subprocess
import sys

PROGRAM = """
import gc, resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
from bise.server.serving import prepare_process
prepare_process()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print(soft == min(hard, 65536), gc.get_freeze_count() > 1000, sys.getswitchinterval() < 0.001)
"""


def test_a_serving_process_takes_all_the_files_it_may_have_and_lets_threads_take_turns_quickly():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3
