"""A model as one page of HTML that needs nothing else (``Picture.save``, ``Picture.open``, notebooks)."""

from flex_model.show.page.render import frame, page

__all__ = ["frame", "page"]
