"""``python -m surgery`` is the console command."""

from surgery.cli import main

main()
