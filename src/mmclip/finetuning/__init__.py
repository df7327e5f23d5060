"""What an image encoder is worth where few films are labelled."""
