// node's `pg` against what PGHOST and PGPORT name: `node cases.mjs NAME` runs one case and exits 0 when it holds.
import assert from "node:assert/strict";
import { once } from "node:events";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import pg from "pg";
import copyStreams from "pg-copy-streams";
import Cursor from "pg-cursor";

const CLIENTS = 12;

async function connected(body, count = 1) {
  const clients = Array.from({ length: count }, () => new pg.Client());
  try {
    await Promise.all(clients.map((client) => client.connect()));
    return await body(...clients);
  } finally {
    await Promise.all(clients.map((client) => client.end()));
  }
}

async function until(condition, what) {
  const deadline = Date.now() + 15_000;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `not within 15 s: ${what}`);
    await new Promise(setImmediate);
  }
}

const code = (sqlstate) => (error) => error.code === sqlstate;

const cases = {
  async values() {
    await connected(async (client) => {
      const sent = [null, true, 2 ** 31 - 1, 1.5, "naïve ☃ 漢字 'quoted'", new Date(86_400_123), [1, 2, 3], { a: [1, null] }];
      const kinds = ["text", "bool", "int4", "float8", "text", "timestamptz", "int4[]", "jsonb"];
      const marks = kinds.map((kind, at) => `$${at + 1}::${kind} AS c${at}`).join(", ");
      const { rows, fields } = await client.query(`SELECT ${marks}`, sent);
      assert.deepEqual(Object.values(rows[0]), sent);
      assert.equal(fields.length, sent.length);
      const big = "0123456789abcdef".repeat(256 * 1024);
      assert.equal((await client.query("SELECT $1::text AS big", [big])).rows[0].big, big);
      const bytes = Buffer.alloc(1 << 20, 7);
      assert.ok((await client.query("SELECT $1::bytea AS b", [bytes])).rows[0].b.equals(bytes));
    });
  },

  async errors() {
    await connected(async (client) => {
      for (const [text, sqlstate] of [["SELECT 1/0", "22012"], ["SELEC 1", "42601"], ["SELECT * FROM no_such", "42P01"]]) {
        await assert.rejects(client.query(text), code(sqlstate));
        await assert.rejects(client.query(text, []), code(sqlstate));
        await assert.rejects(client.query({ text: `${text} -- $1`, values: [] , name: sqlstate }), code(sqlstate));
        assert.equal((await client.query("SELECT $1::int AS n", [5])).rows[0].n, 5);
      }
      // What is queued behind an error is answered all the same.
      const ends = await Promise.allSettled([1, 0, 2].map((n) => client.query("SELECT 4 / $1::int AS n", [n])));
      assert.deepEqual(ends.map((end) => end.value?.rows[0].n ?? end.reason.code), [4, "22012", 2]);
    });
  },

  async transactions() {
    await connected(async (one, other) => {
      await one.query("CREATE TABLE t (id int PRIMARY KEY)");
      await one.query("BEGIN");
      await one.query("INSERT INTO t VALUES ($1)", [1]);
      assert.equal((await other.query("SELECT * FROM t")).rowCount, 0);
      await one.query("SAVEPOINT s");
      await assert.rejects(one.query("INSERT INTO t VALUES ($1)", [1]), code("23505"));
      await assert.rejects(one.query("SELECT 1"), code("25P02"));
      await one.query("ROLLBACK TO s");
      await one.query("COMMIT");
      assert.equal((await other.query("SELECT * FROM t")).rowCount, 1);
      await one.query("BEGIN");
      await one.query("INSERT INTO t VALUES (2)");
      await one.query("ROLLBACK");
      assert.equal((await other.query("SELECT * FROM t")).rowCount, 1);
      const [first, second] = await one.query("SELECT 1 AS a; SELECT 2 AS b");
      assert.deepEqual([first.rows, second.rows], [[{ a: 1 }], [{ b: 2 }]]);
    }, 2);
  },

  async named() {
    // Every client gives the same name to a text of its own.
    await connected(async (...clients) => {
      for (let turn = 0; turn < 10; turn++) {
        const ends = await Promise.all(clients.map((client, number) => client.query({
          name: "mine", text: `SELECT $1::int + ${number} AS n, '${number}' AS mark`, values: [turn],
        })));
        assert.deepEqual(ends.map(({ rows }) => rows[0]), clients.map((_, number) => ({ n: turn + number, mark: `${number}` })));
      }
    }, CLIENTS);
  },

  async pool() {
    const pool = new pg.Pool({ max: CLIENTS });
    try {
      const ends = await Promise.all(Array.from({ length: 300 }, async (_, number) => {
        const client = await pool.connect();
        try {
          await client.query("BEGIN");
          const { rows } = await client.query("SELECT $1::int AS n", [number]);
          await client.query("COMMIT");
          return rows[0].n;
        } finally {
          client.release();
        }
      }));
      assert.deepEqual(ends, Array.from({ length: 300 }, (_, number) => number));
      const single = await Promise.all(ends.map((number) => pool.query("SELECT $1::int * 2 AS n", [number])));
      assert.deepEqual(single.map(({ rows }) => rows[0].n), ends.map((number) => number * 2));
    } finally {
      await pool.end();
    }
  },

  async cursors() {
    await connected(async (client) => {
      await client.query("BEGIN");
      const cursor = client.query(new Cursor("SELECT n FROM generate_series(1, $1) AS n", [1000]));
      assert.deepEqual((await cursor.read(2)).map(({ n }) => n), [1, 2]);
      assert.equal((await cursor.read(500)).length, 500);
      await cursor.close();
      await client.query("COMMIT");
      const alone = client.query(new Cursor("SELECT n FROM generate_series(1, 100) AS n"));
      assert.equal((await alone.read(10)).length, 10);
      await alone.close();
      assert.equal((await client.query("SELECT 1 AS n")).rows[0].n, 1);
    });
  },

  async copies() {
    await connected(async (client) => {
      await client.query("CREATE TABLE t (id int, note text)");
      const lines = Array.from({ length: 20_000 }, (_, n) => `${n}\tnote ${n}\n`);
      await pipeline(Readable.from(lines), client.query(copyStreams.from("COPY t FROM STDIN")));
      let heard = "";
      const out = client.query(copyStreams.to("COPY (SELECT * FROM t ORDER BY id) TO STDOUT"));
      for await (const part of out) heard += part;
      assert.equal(heard, lines.join(""));
      await assert.rejects(
        pipeline(Readable.from(["no number\n"]), client.query(copyStreams.from("COPY t FROM STDIN"))), code("22P02"));
      assert.equal((await client.query("SELECT count(*)::int AS n FROM t")).rows[0].n, 20_000);
    });
  },

  async notifications() {
    await connected(async (listener, speaker) => {
      const heard = [];
      listener.on("notification", ({ channel, payload }) => heard.push([channel, payload]));
      await listener.query("LISTEN news");
      await speaker.query("SELECT pg_notify('news', $1)", ["hello"]);
      await until(() => heard.length > 0, "a notification");
      assert.deepEqual(heard, [["news", "hello"]]);
      await listener.query("UNLISTEN news");
    }, 2);
  },

  async cancel() {
    await connected(async (victim, bystander) => {
      const text = "SELECT pg_sleep(60), 'cancel ' || 'me'";
      const query = new pg.Query(text);
      const ended = once(query, "error");
      victim.query(query);
      await until(async () => (await bystander.query(
        "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query = $1", [text])).rowCount === 1, "its start");
      const other = bystander.query("SELECT pg_sleep(0.3), 'bystander' AS mark");
      new pg.Client().cancel(victim, query);
      assert.equal((await ended)[0].code, "57014");
      assert.equal((await other).rows[0].mark, "bystander");
      assert.equal((await victim.query("SELECT 'alive' AS mark")).rows[0].mark, "alive");
    }, 2);
  },

  async torn() {
    // Sockets that are destroyed in the middle of everything.
    const clients = Array.from({ length: CLIENTS }, () => new pg.Client());
    await Promise.all(clients.map((client) => client.connect()));
    const ends = clients.map(async (client, number) => {
      client.on("error", () => {});
      if (number % 3 === 0) await client.query("BEGIN");
      const query = client.query("SELECT pg_sleep(30)");
      client.connection.stream.destroy();
      await assert.rejects(query);
    });
    await Promise.all(ends);
    await connected(async (client) => assert.equal((await client.query("SELECT 1 AS n")).rows[0].n, 1));
  },
};

const [name] = process.argv.slice(2);
await cases[name]();
