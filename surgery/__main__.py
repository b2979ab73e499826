"""``python -m surgery`` is the console command."""

from surgery.cli.main import main

main()
