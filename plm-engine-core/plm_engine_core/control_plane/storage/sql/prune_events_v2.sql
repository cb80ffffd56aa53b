-- Removes the beginnings of a tenant's event streams that its retention no longer asks for, as far as a signed checkpoint
-- covers them and an export of that checkpoint is recorded. What stays behind of each is a stub: the last sequence and
-- hash that are gone, from which the rest is verified. Streams of runs that have not ended stay whole.
-- Runs as the owner, because nobody else may delete events; the trigger on `events` lets even the owner delete no event
-- that no stub covers, and the one on `event_stubs` make no stub that no exported checkpoint covers.
-- A stub also says where the last event that went stood in the feed, and by which transaction it went, so that a reader who
-- has not seen it can be told.
-- Answers {"status": "pruned" | "nothing", "checkpoint", "streams", "events"}.
CREATE FUNCTION engine_prune_events_v2(p_tenant uuid, p_actor text) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_keep    interval;
    v_number  bigint;
    v_streams bigint;
    v_events  bigint;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    PERFORM pg_advisory_xact_lock(hashtextextended('checkpoint/' || p_tenant, 0));
    SELECT keep INTO v_keep FROM event_retention WHERE tenant_id = p_tenant;
    SELECT max(c.number) INTO v_number FROM event_checkpoints AS c
        WHERE c.tenant_id = p_tenant AND c.taken_at <= clock_timestamp() - v_keep
          AND c.number <= (SELECT max(x.number) FROM event_exports AS x WHERE x.tenant_id = p_tenant);
    IF v_number IS NULL THEN
        RETURN jsonb_build_object('status', 'nothing', 'checkpoint', NULL, 'streams', 0, 'events', 0);
    END IF;

    WITH covered AS (
        SELECT DISTINCT ON (h.stream) h.stream, h.number, h.last_seq, h.last_hash FROM event_checkpoint_heads AS h
        WHERE h.tenant_id = p_tenant AND h.number <= v_number ORDER BY h.stream, h.number DESC
    ), going_on AS (
        SELECT 'run/' || r.run_id AS stream FROM run_states AS r
        WHERE r.tenant_id = p_tenant AND r.state NOT IN ('succeeded', 'failed', 'cancelled')
    )
    INSERT INTO event_stubs (tenant_id, stream, number, last_seq, last_hash, last_position)
        SELECT p_tenant, c.stream, c.number, c.last_seq, c.last_hash, (SELECT e.feed_position FROM events AS e
            WHERE e.tenant_id = p_tenant AND e.stream = c.stream AND e.seq = c.last_seq) FROM covered AS c
        WHERE NOT EXISTS (SELECT FROM going_on AS g WHERE g.stream = c.stream)
          AND NOT EXISTS (SELECT FROM event_stubs AS s
              WHERE s.tenant_id = p_tenant AND s.stream = c.stream AND s.last_seq >= c.last_seq);
    GET DIAGNOSTICS v_streams = ROW_COUNT;
    DELETE FROM events AS e USING event_stubs AS s
        WHERE e.tenant_id = p_tenant AND s.tenant_id = p_tenant AND s.stream = e.stream AND e.seq <= s.last_seq;
    GET DIAGNOSTICS v_events = ROW_COUNT;
    IF v_streams = 0 THEN
        RETURN jsonb_build_object('status', 'nothing', 'checkpoint', v_number, 'streams', 0, 'events', 0);
    END IF;
    PERFORM engine_append_event_v1(p_tenant, 'tenant', 'events_pruned', p_actor, jsonb_build_object(
        'checkpoint', v_number, 'streams', v_streams, 'events', v_events, 'keep', v_keep::text));
    RETURN jsonb_build_object('status', 'pruned', 'checkpoint', v_number, 'streams', v_streams, 'events', v_events);
END
$$;
