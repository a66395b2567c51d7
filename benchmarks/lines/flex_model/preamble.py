from flex_model import FlexModel
from given import model

fm = FlexModel(model)
