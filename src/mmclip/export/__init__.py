"""What a run gives to others: folders of transformers, and ONNX graphs."""
