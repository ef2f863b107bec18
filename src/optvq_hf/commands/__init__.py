"""The `optvq` commands, one module each with make_parser() and main(argv)."""
