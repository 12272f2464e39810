"""What people look at: tables, pages, pictures, curves and the card of a model. It is given plain JSON and tensors of images."""
