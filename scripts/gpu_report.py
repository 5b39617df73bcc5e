"""The command `gpu_report` of treespec_jax.commands; --help describes it."""

from treespec_jax import cli

if __name__ == "__main__":
    cli.run_command("gpu_report")
