"""The command `measure_costs` of treespec_jax.commands; --help describes it."""

from treespec_jax import cli

if __name__ == "__main__":
    cli.run_command("measure_costs")
