from small_data import image_folder, weights
from small_recipes import cub, recipes, trunk_features

__all__ = ["cub", "image_folder", "recipes", "trunk_features", "weights"]
