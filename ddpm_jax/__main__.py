from ddpm_jax.cli.main import run

run()
