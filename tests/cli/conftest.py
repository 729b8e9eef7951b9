from small_data import image_folder, weights

__all__ = ["image_folder", "weights"]
