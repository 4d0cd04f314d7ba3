from rodimus_mlx.model import Model, ModelArgs

__all__ = ["Model", "ModelArgs"]
