"""The command `calibrate_int8` of treespec_jax.commands; --help describes it."""

from treespec_jax import cli

if __name__ == "__main__":
    cli.run_command("calibrate_int8")
