import shutil

import pytest
from mlflow import MlflowClient

from cytoray.tracking import Tracker


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A migrated SQLite store without experiments: making one takes more than a second."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracker(empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", "tests")
