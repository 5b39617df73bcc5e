"""What the scripts generate.py and benchmark.py do; nothing else imports this."""
