"""`setformer selftest` on the device, which may be the emulated one."""

import sys

from setformer_ext import cli

from . import device


def main() -> None:
    """`--device NAME`, then the command's own options."""
    name, arguments = sys.argv[2], sys.argv[3:]
    if name == "emulated":
        device.find(name)
        name, arguments = "cpu", ["--in-process", *arguments]
    sys.exit(cli.main(["selftest", "--device", name, *arguments]))


if __name__ == "__main__":
    main()
