"""`python -m blip_pipelines`: the same as `kedro run`, also where only the installed wheel is there."""

from pathlib import Path


def main() -> None:
    from kedro.framework.cli.utils import find_run_command
    from kedro.framework.project import configure_project

    package = Path(__file__).parent.name
    configure_project(package)
    find_run_command(package)()


if __name__ == "__main__":
    main()
