"""A window of Qt's Chromium on no screen, driven from outside: python window.py

`QTWEBENGINE_REMOTE_DEBUGGING` names the address at which it takes Chromium's DevTools protocol.
"""

import sys

from PySide6.QtCore import QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

application = QApplication(sys.argv)
view = QWebEngineView()
view.resize(1280, 1000)
view.setUrl(QUrl("about:blank"))
view.show()
sys.exit(application.exec())
