"""What an image encoder is worth where few images are labelled."""
