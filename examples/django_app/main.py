"""Django in one file, as ASGI and as WSGI. Django loads fine with a broken URLconf and then fails every request:
`--check` asks one before any client does.

handoff run main:asgi --chdir examples/django_app --check /
handoff run main:wsgi --chdir examples/django_app --check /
"""

from __future__ import annotations

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

settings.configure(
    SECRET_KEY="only an example",
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["localhost", "127.0.0.1", "test"],
)


def hello(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Hello from Django!\n")


urlpatterns = [path("", hello)]
asgi = get_asgi_application()
wsgi = get_wsgi_application()
