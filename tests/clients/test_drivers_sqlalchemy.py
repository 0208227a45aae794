"""SQLAlchemy through the proxy, over each driver, with its defaults: an ORM, pools of its own, and its probes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from front import CLIENTS, Front
from sqlalchemy import orm
from sqlalchemy.ext import asyncio as sa_asyncio

from pool_kit import behaviour

BLOCKING = ("psycopg", "psycopg2")
ASYNC = ("psycopg", "asyncpg")


class Base(orm.DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(unique=True)
    books: orm.Mapped[list[Book]] = orm.relationship(back_populates="author", lazy="selectin")


class Book(Base):
    __tablename__ = "book"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    title: orm.Mapped[str]
    about: orm.Mapped[dict[str, Any]] = orm.mapped_column(sa.JSON)
    author_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("author.id"))
    author: orm.Mapped[Author] = orm.relationship(back_populates="books")


@pytest.fixture(params=BLOCKING)
def engine(request: pytest.FixtureRequest, front: Front) -> Iterator[sa.Engine]:
    engine = sa.create_engine(front.url(f"postgresql+{request.param}"))
    yield engine
    engine.dispose()


def library(name: str) -> Author:
    books = [Book(title=f"{name} {n}", about={"pages": n, "tags": [None, "☃"]}) for n in range(20)]
    return Author(name=name, books=books)


def test_objects_make_the_round_trip(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add_all([library("one"), library("two")])
        session.commit()
    with orm.Session(engine) as session:
        author = session.scalars(sa.select(Author).where(Author.name == "two")).one()
        assert [book.title for book in author.books] == [f"two {n}" for n in range(20)]
        assert author.books[7].about == {"pages": 7, "tags": [None, "☃"]}
        author.books[7].about = {"pages": 0}
        session.delete(author.books[8])
        session.commit()
        assert session.scalar(sa.select(sa.func.count()).select_from(Book)) == 39
        session.add(Author(name="one"))
        with pytest.raises(sa.exc.IntegrityError) as caught:
            session.flush()
        assert getattr(caught.value.orig, "sqlstate", getattr(caught.value.orig, "pgcode", "")) == "23505"
        session.rollback()
        with session.begin_nested():
            session.add(Author(name="three"))
        session.commit()
        assert session.scalars(sa.select(Author.name).order_by(Author.name)).all() == ["one", "three", "two"]
    assert sorted(sa.inspect(engine).get_table_names()) == ["author", "book"]
    Base.metadata.drop_all(engine)


def test_threads_share_its_pool(engine: sa.Engine) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            with engine.begin() as conn:
                assert conn.execute(sa.text("SELECT :a"), {"a": f"{number}/{turn}"}).scalar() == f"{number}/{turn}"

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(work, range(CLIENTS)))


@pytest.mark.parametrize("driver", BLOCKING)
def test_its_ping_before_use_is_answered_and_an_isolation_level_stays_its_own(front: Front, driver: str) -> None:
    engine = sa.create_engine(front.url(f"postgresql+{driver}"), pool_pre_ping=True)
    strict = engine.execution_options(isolation_level="SERIALIZABLE")
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    try:
        for _ in range(5):
            with strict.connect() as conn:
                assert conn.scalar(sa.text("SHOW transaction_isolation")) == "serializable"
            with engine.connect() as conn:
                assert conn.scalar(sa.text("SHOW transaction_isolation")) == "read committed"
            with alone.connect() as conn:
                assert conn.scalar(sa.text("SELECT 1")) == 1
    finally:
        engine.dispose()


@pytest.mark.parametrize("driver", BLOCKING)
def test_streamed_and_many_rows(front: Front, driver: str) -> None:
    engine = sa.create_engine(front.url(f"postgresql+{driver}"))
    numbers = sa.Table("numbers", sa.MetaData(), sa.Column("n", sa.Integer), sa.Column("note", sa.Text))
    try:
        with engine.begin() as conn:
            numbers.create(conn)
            conn.execute(sa.insert(numbers), [{"n": n, "note": f"n{n}"} for n in range(3000)])
            stream = conn.execution_options(stream_results=True, max_row_buffer=100).execute(
                sa.select(numbers.c.n)
            )
            assert sum(row.n for row in stream) == 4_498_500
        with engine.begin() as conn:
            numbers.drop(conn)
    finally:
        engine.dispose()


@pytest.mark.parametrize("driver", ASYNC)
@behaviour
async def test_asyncio_sessions_make_the_round_trip(front: Front, driver: str) -> None:
    engine = sa_asyncio.create_async_engine(
        front.url(f"postgresql+{driver}"), pool_size=CLIENTS, pool_pre_ping=True
    )
    sessions = sa_asyncio.async_sessionmaker(engine, expire_on_commit=False)
    try:
        async with engine.begin() as conn:
            await conn.run_sync(Base.metadata.create_all)

        async def work(number: int) -> None:
            async with sessions() as session:
                session.add(library(f"author {number}"))
                await session.commit()
            async with sessions() as session:
                found = (await session.scalars(sa.select(Author).where(Author.name == f"author {number}"))).one()
                assert [book.title for book in found.books] == [f"author {number} {n}" for n in range(20)]

        async with asyncio.timeout(30):
            await asyncio.gather(*(work(number) for number in range(CLIENTS * 2)))
        async with sessions() as session:
            session.add(Author(name="author 1"))
            with pytest.raises(sa.exc.IntegrityError):
                await session.commit()
            await session.rollback()
            assert await session.scalar(sa.select(sa.func.count()).select_from(Book)) == CLIENTS * 2 * 20
        async with engine.begin() as conn:
            await conn.run_sync(Base.metadata.drop_all)
    finally:
        await engine.dispose()
