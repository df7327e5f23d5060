"""`python -m mmclip`, which torchrun and accelerate launch."""

from mmclip.cli import main

main()
