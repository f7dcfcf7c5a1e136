"""The scripts that need nothing more than the package."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_single_batch_prints_a_smaller_second_loss(tmp_path):
    words = [sys.executable, SCRIPTS / "single_batch.py", "--dataset", "digits"]
    walked = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert walked.returncode == 0, walked.stderr
    losses = {name: float(loss) for name, loss in re.findall(r"^(loss\d): (\S+)$", walked.stdout, flags=re.MULTILINE)}
    assert losses.keys() == {"loss1", "loss2"}
    assert losses["loss2"] < losses["loss1"]
    assert "number correct:" in walked.stdout
    for gradient in ("conv1.kernel: [5, 5, 1, 6]", "fc1.kernel: [192, 120]", "out.bias: [10]"):
        assert f"gradient of {gradient}" in walked.stdout


def test_single_batch_errors_in_one_line(tmp_path):
    words = [sys.executable, SCRIPTS / "single_batch.py", "--dataset", "digit"]
    walked = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert walked.returncode == 2
    assert walked.stderr.startswith("error: unknown dataset 'digit'; did you mean 'digits'?")
    assert walked.stderr.count("\n") == 1
