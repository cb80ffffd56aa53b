-- As version 2, but one batch of a pruning: it removes at most p_limit events, looks at no more than p_limit places, and
-- begins nothing after a second, for until its transaction ends no reader of any feed sees what was committed after it began.
-- Whoever calls it calls again, in the next transaction, while there is more. A row of `event_prunings` says meanwhile how
-- far the pruning is: up to which checkpoint it goes, and the last event that was looked at, in the order of streams. So two
-- who prune at once share the batches, and who comes after one that was killed goes on where it stood.
-- A stub is made with the first events of its stream that go. Where it stands for more than one batch removes, the next ones
-- remove the others from the lowest on; for exports and the verifier they are gone already.
-- The first batch that makes a stub is told of at once, by an event in the tenant's stream; what the others took is told of
-- by one event of the last batch.
-- Answers {"status": "pruned" | "nothing", "checkpoint", "streams", "events", "more"}: what this batch made and removed.
CREATE FUNCTION engine_prune_events_v3(p_tenant uuid, p_actor text, p_limit integer) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_longest CONSTANT interval := '1 second';
    v_at_once CONSTANT bigint := 1000;
    v_tenant  uuid := engine_enter_v2(p_tenant);
    v_begun   timestamptz;
    v_keep    interval;
    v_number  bigint;
    v_cover   bigint := 0;
    v_at      event_prunings%ROWTYPE;
    v_head    event_checkpoint_heads%ROWTYPE;
    v_stream  text;
    v_first   bigint;
    v_gone    bigint;
    v_upto    bigint;
    v_count   bigint;
    v_looked  bigint := 0;
    v_streams bigint := 0;
    v_events  bigint := 0;
    v_more    boolean := false;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('checkpoint/' || v_tenant, 0));
    v_begun := clock_timestamp();
    SELECT keep INTO v_keep FROM event_retention WHERE tenant_id = v_tenant;
    SELECT max(c.number) INTO v_number FROM event_checkpoints AS c
        WHERE c.tenant_id = v_tenant AND c.taken_at <= clock_timestamp() - v_keep
          AND c.number <= (SELECT max(x.number) FROM event_exports AS x WHERE x.tenant_id = v_tenant);
    SELECT * INTO v_at FROM event_prunings WHERE tenant_id = v_tenant;
    IF v_at.tenant_id IS NULL THEN
        v_at := ROW(v_tenant, v_number, v_keep, '', 0, 0, 0, false, v_begun);
    ELSIF v_number IS NOT NULL THEN
        v_at.number := LEAST(v_at.number, v_number);
        v_at.keep := v_keep;
    END IF;
    IF v_number IS NOT NULL THEN
        v_cover := v_at.number;  -- else no stub is made any more, and what those that stand left is still removed
    END IF;

    WHILE v_at.number IS NOT NULL LOOP
        SELECT e.stream, e.seq INTO v_stream, v_first FROM events AS e
            WHERE e.tenant_id = v_tenant AND (e.stream, e.seq) > (v_at.stream, v_at.seq)
            ORDER BY e.stream, e.seq LIMIT 1;
        EXIT WHEN v_stream IS NULL;
        v_more := v_looked > 0
            AND (v_events >= p_limit OR v_looked >= p_limit OR clock_timestamp() >= v_begun + v_longest);
        EXIT WHEN v_more;
        v_looked := v_looked + 1;

        SELECT max(s.last_seq) INTO v_gone FROM event_stubs AS s WHERE s.tenant_id = v_tenant AND s.stream = v_stream;
        SELECT * INTO v_head FROM event_checkpoint_heads AS h
            WHERE h.tenant_id = v_tenant AND h.stream = v_stream AND h.number <= v_cover
            ORDER BY h.number DESC LIMIT 1;
        IF v_head.last_seq >= v_first AND v_head.last_seq > COALESCE(v_gone, 0) AND NOT EXISTS (
            SELECT FROM run_states AS r WHERE r.tenant_id = v_tenant
               AND r.run_id = CASE WHEN v_stream ~ '^run/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                                   THEN substr(v_stream, 5)::uuid END
               AND r.state NOT IN ('succeeded', 'failed', 'cancelled')) THEN
            INSERT INTO event_stubs (tenant_id, stream, number, last_seq, last_hash, last_position)
                VALUES (v_tenant, v_stream, v_head.number, v_head.last_seq, v_head.last_hash,
                        (SELECT e.feed_position FROM events AS e
                         WHERE e.tenant_id = v_tenant AND e.stream = v_stream AND e.seq = v_head.last_seq));
            v_streams := v_streams + 1;
            v_at.streams := v_at.streams + 1;
            v_at.events := v_at.events + v_head.last_seq - GREATEST(v_first - 1, v_gone);
            v_gone := v_head.last_seq;
        END IF;

        v_at.stream := v_stream;
        v_at.seq := 9223372036854775807;  -- nothing more of this stream
        IF v_gone >= v_first THEN
            v_upto := LEAST(v_gone, v_first - 1 + GREATEST(LEAST(p_limit - v_events, v_at_once), 1));
            DELETE FROM events AS e
                WHERE e.tenant_id = v_tenant AND e.stream = v_stream AND e.seq BETWEEN v_first AND v_upto;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            v_events := v_events + v_count;
            IF v_upto < v_gone THEN
                v_at.seq := v_upto;
            END IF;
        END IF;
    END LOOP;

    IF v_at.streams > 0 AND NOT (v_at.told AND v_more) THEN
        PERFORM engine_append_event_v3(v_tenant, 'tenant', 'events_pruned', p_actor, jsonb_build_object(
            'checkpoint', v_at.number, 'streams', v_at.streams, 'events', v_at.events, 'keep', v_at.keep::text,
            'more', v_more));
        v_at.streams := 0;
        v_at.events := 0;
        v_at.told := true;
    END IF;
    DELETE FROM event_prunings WHERE tenant_id = v_tenant;
    IF v_more THEN
        INSERT INTO event_prunings SELECT v_at.*;
    END IF;
    RETURN jsonb_build_object('status', CASE WHEN v_events > 0 THEN 'pruned' ELSE 'nothing' END,
        'checkpoint', v_at.number, 'streams', v_streams, 'events', v_events, 'more', v_more);
END
$$;
