"""Entry point of the `gradops` command. What it runs is in `commands`, which needs the `bench` extra."""
import sys


def main() -> None:
    try:
        from .commands import gradops
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("click", "rich"):
            raise
        sys.exit(f"gradops: this command needs {missing}. Install it with: pip install 'gradops[bench]'")
    gradops(prog_name="gradops")


if __name__ == "__main__":
    main()
