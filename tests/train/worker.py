"""What torchrun starts: trains or resumes, and writes each rank's weights down."""

import sys
from pathlib import Path

from safetensors.torch import save_file

from earlybird.errors import EarlybirdError
from earlybird.train import run
from earlybird.train.recipe import Recipe


def main(do: str, folder: str, recipe: str) -> int:
    class Witness(run.Run):
        def finish(self) -> run.Result:
            result = super().finish()
            tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(tensors, Path(folder).with_name(f"{Path(folder).name}-rank{self.fabric.global_rank}.safetensors"))
            return result

    run.Run = Witness  # type: ignore[misc]
    try:
        if do == "train":
            run.train(Recipe.from_toml(recipe), folder, quiet=True)
        else:
            run.resume(folder, quiet=True)
    except EarlybirdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
