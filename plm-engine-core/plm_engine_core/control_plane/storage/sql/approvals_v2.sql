-- Approvals: votes, the decision they add up to, time-outs, comments, and the approval scopes that an approver may leave behind.
-- Locks everywhere: run, ticket, approval scope, stream head.

-- What happens to a pending ticket whose deadline has passed: the policy under which it was opened said so. It is handed on
-- to a wider circle once, with a new deadline, or expires and its run goes on to a denial. The caller holds run and ticket.
CREATE FUNCTION engine_time_out_ticket_v2(p_ticket approval_tickets, p_actor text) RETURNS approval_tickets
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_ticket approval_tickets;
BEGIN
    IF p_ticket.state <> 'pending' OR p_ticket.deadline > clock_timestamp() THEN
        RETURN p_ticket;
    END IF;
    IF p_ticket.escalate_seconds IS NOT NULL AND p_ticket.escalated_at IS NULL THEN
        UPDATE approval_tickets SET escalated_at = clock_timestamp(),
                deadline = clock_timestamp() + make_interval(secs => escalate_seconds)
            WHERE tenant_id = p_ticket.tenant_id AND id = p_ticket.id RETURNING * INTO v_ticket;
    ELSE
        UPDATE approval_tickets SET state = 'expired'
            WHERE tenant_id = p_ticket.tenant_id AND id = p_ticket.id RETURNING * INTO v_ticket;
        UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = p_ticket.tenant_id AND run_id = p_ticket.run_id AND state = 'awaiting_approval';
    END IF;
    PERFORM engine_append_event_v1(v_ticket.tenant_id, 'run/' || v_ticket.run_id,
        CASE v_ticket.state WHEN 'expired' THEN 'approval_expired' ELSE 'approval_escalated' END, p_actor,
        jsonb_build_object('ticket_id', v_ticket.id, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt,
            'deadline', CASE v_ticket.state WHEN 'expired' THEN p_ticket.deadline ELSE v_ticket.deadline END));
    RETURN v_ticket;
END
$$;

-- Times the tickets of one run out. Answers whether one expired, so that the caller delivers the run.
CREATE FUNCTION engine_time_out_tickets_v2(p_tenant uuid, p_run uuid, p_actor text) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_ticket  approval_tickets;
    v_expired boolean := false;
BEGIN
    PERFORM 1 FROM run_states WHERE tenant_id = p_tenant AND run_id = p_run FOR UPDATE;
    FOR v_ticket IN SELECT * FROM approval_tickets
        WHERE tenant_id = p_tenant AND run_id = p_run AND state = 'pending' AND deadline <= clock_timestamp() FOR UPDATE
    LOOP
        v_ticket := engine_time_out_ticket_v2(v_ticket, p_actor);
        v_expired := v_expired OR v_ticket.state = 'expired';
    END LOOP;
    RETURN v_expired;
END
$$;

-- Why a voter cannot be counted, or null. Nobody decides what they asked for themselves, or had asked for by delegation.
CREATE FUNCTION engine_refused_vote_v2(p_ticket approval_tickets, p_principal jsonb, c jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF p_ticket.requested_by = (c ->> 'voter')::uuid OR COALESCE(p_principal -> 'delegated_by', '[]') ? (c ->> 'voter') THEN
        RETURN jsonb_build_object('reason', 'separation_of_duties',
            'message', 'the requester of a call cannot decide its approval, nor can who had it requested');
    ELSIF p_ticket.state = 'expired' THEN
        RETURN jsonb_build_object('reason', 'approval_expired',
            'message', format('the deadline %s has passed; the call is denied', p_ticket.deadline));
    ELSIF p_ticket.state <> 'pending' THEN
        RETURN jsonb_build_object('reason', 'already_decided',
            'message', format('the ticket is already %s', p_ticket.state));
    ELSIF (p_ticket.escalated_at IS NOT NULL) <> (c -> 'escalated')::boolean THEN
        RETURN jsonb_build_object('reason', 'escalated',
            'message', 'the ticket was handed on meanwhile; whoever decides it now needs another OAuth scope');
    ELSIF EXISTS (SELECT FROM approval_votes
                  WHERE tenant_id = p_ticket.tenant_id AND ticket_id = p_ticket.id AND voter = (c ->> 'voter')::uuid) THEN
        RETURN jsonb_build_object('reason', 'already_voted',
            'message', 'you have voted on this ticket before, the other way; a vote is given once');
    END IF;
    RETURN NULL;
END
$$;

-- Counts one vote: a denial ends the ticket, and so do `quorum` approvals by different people inside the deadline.
-- Answers {"status": "decided" | "counted" | "refused", ...}; the same vote by the same person again answers the same.
CREATE FUNCTION engine_decide_ticket_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_id      uuid := (c ->> 'ticket_id')::uuid;
    v_voter   uuid := (c ->> 'voter')::uuid;
    v_run     run_states;
    v_was     text;
    v_ticket  approval_tickets;
    v_refusal jsonb;
    v_votes   integer;
    v_state   text;
    v_scope   jsonb;
BEGIN
    PERFORM engine_enter_v1(v_tenant);
    SELECT run_id INTO v_ticket.run_id FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'approval ticket', DETAIL = v_id;
    END IF;
    SELECT * INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id FOR UPDATE;
    SELECT * INTO v_ticket FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id FOR UPDATE;
    -- Tickets that version 1 decided have a decider and no votes.
    IF EXISTS (SELECT FROM approval_votes WHERE tenant_id = v_tenant AND ticket_id = v_id AND voter = v_voter
               AND vote = c ->> 'vote')
       OR (v_ticket.decided_by = v_voter AND v_ticket.state = CASE c ->> 'vote' WHEN 'approve' THEN 'approved' ELSE 'denied' END)
    THEN
        RETURN jsonb_build_object('status', CASE v_ticket.state WHEN 'pending' THEN 'counted' ELSE 'decided' END,
            'run_id', v_ticket.run_id, 'replayed', true, 'deliver', false);
    END IF;
    v_was := v_ticket.state;
    v_ticket := engine_time_out_ticket_v2(v_ticket, c ->> 'actor');
    v_refusal := engine_refused_vote_v2(v_ticket, v_run.principal, c);
    IF v_refusal IS NOT NULL THEN
        RETURN v_refusal || jsonb_build_object('status', 'refused', 'run_id', v_ticket.run_id,
            'deliver', v_was = 'pending' AND v_ticket.state = 'expired');
    END IF;

    INSERT INTO approval_votes (tenant_id, ticket_id, voter, vote, comment, authority, scope_uses, scope_seconds,
            scope_any_resource)
        VALUES (v_tenant, v_id, v_voter, c ->> 'vote', c ->> 'comment', ARRAY(SELECT jsonb_array_elements_text(c -> 'authority')),
            (c #>> '{scope,uses}')::integer, (c #>> '{scope,seconds}')::double precision,
            (c #>> '{scope,any_resource}')::boolean);
    SELECT count(*) INTO v_votes FROM approval_votes WHERE tenant_id = v_tenant AND ticket_id = v_id AND vote = 'approve';
    v_state := CASE WHEN c ->> 'vote' = 'deny' THEN 'denied' WHEN v_votes >= (c ->> 'quorum')::integer THEN 'approved' END;
    IF v_state IS NOT NULL THEN
        UPDATE approval_tickets SET state = v_state, decided_at = clock_timestamp(), decided_by = v_voter,
                comment = c ->> 'comment'
            WHERE tenant_id = v_tenant AND id = v_id AND state = 'pending';
        UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id AND state = 'awaiting_approval';
    END IF;
    IF v_state = 'approved' THEN
        v_scope := engine_leave_approval_scope_v2(v_ticket, v_run.agent_id, v_voter, (c ->> 'scope_id')::uuid);
    END IF;
    PERFORM engine_append_event_v1(v_tenant, 'run/' || v_ticket.run_id,
        CASE WHEN v_state IS NULL THEN 'approval_voted' ELSE 'approval_decided' END, c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('ticket_id', v_id, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt,
            'vote', c ->> 'vote', 'votes', v_votes, 'quorum', (c ->> 'quorum')::integer, 'authority', c -> 'authority',
            'decision', v_state, 'digest', v_ticket.digest, 'comment', NULLIF(c ->> 'comment', ''), 'scope', v_scope)));
    RETURN jsonb_build_object('status', CASE WHEN v_state IS NULL THEN 'counted' ELSE 'decided' END,
        'run_id', v_ticket.run_id, 'replayed', false, 'deliver', v_state IS NOT NULL);
END
$$;

-- Leaves an approval scope behind where every approver of the ticket offered one: the narrowest of their terms.
-- It is for the same requester, so that no approver approves their own later calls by it.
CREATE FUNCTION engine_leave_approval_scope_v2(p_ticket approval_tickets, p_agent text, p_by uuid, p_id uuid) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_scope approval_scopes;
BEGIN
    INSERT INTO approval_scopes (tenant_id, id, ticket_id, capability, resource, agent, requested_by, policy_digest, tier,
            risk, max_uses, expires_at, granted_by)
        SELECT p_ticket.tenant_id, p_id, p_ticket.id, p_ticket.capability,
               CASE WHEN bool_and(v.scope_any_resource) THEN NULL ELSE p_ticket.resource END, p_agent,
               p_ticket.requested_by, p_ticket.policy_digest, p_ticket.tier, p_ticket.risk, min(v.scope_uses),
               clock_timestamp() + make_interval(secs => min(v.scope_seconds)), p_by
        FROM approval_votes AS v
        WHERE v.tenant_id = p_ticket.tenant_id AND v.ticket_id = p_ticket.id AND v.vote = 'approve'
        HAVING bool_and(v.scope_uses IS NOT NULL) AND p_agent <> ''
        RETURNING * INTO v_scope;
    RETURN CASE WHEN v_scope.id IS NOT NULL THEN jsonb_strip_nulls(jsonb_build_object('id', v_scope.id,
        'uses', v_scope.max_uses, 'expires_at', v_scope.expires_at, 'resource', v_scope.resource)) END;
END
$$;

-- Adds a comment to a ticket, whatever its state: comments decide nothing.
CREATE FUNCTION engine_comment_ticket_v2(p_tenant uuid, p_ticket uuid, p_id uuid, p_author uuid, p_actor text, p_body text)
RETURNS approval_comments
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_ticket  approval_tickets;
    v_comment approval_comments;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    SELECT * INTO v_ticket FROM approval_tickets WHERE tenant_id = p_tenant AND id = p_ticket;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'approval ticket', DETAIL = p_ticket;
    END IF;
    INSERT INTO approval_comments (tenant_id, id, ticket_id, author, body)
        VALUES (p_tenant, p_id, p_ticket, p_author, p_body) RETURNING * INTO v_comment;
    PERFORM engine_append_event_v1(p_tenant, 'run/' || v_ticket.run_id, 'approval_commented', p_actor,
        jsonb_build_object('ticket_id', p_ticket, 'comment_id', p_id, 'body', p_body));
    RETURN v_comment;
END
$$;

-- Ends an approval scope before its time; ending it twice answers the same.
CREATE FUNCTION engine_revoke_approval_scope_v2(p_tenant uuid, p_scope uuid, p_by uuid, p_actor text) RETURNS approval_scopes
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_scope approval_scopes;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    UPDATE approval_scopes SET revoked_at = clock_timestamp(), revoked_by = p_by
        WHERE tenant_id = p_tenant AND id = p_scope AND revoked_at IS NULL RETURNING * INTO v_scope;
    IF FOUND THEN
        PERFORM engine_append_event_v1(p_tenant, 'tenant', 'approval_scope_revoked', p_actor,
            jsonb_build_object('scope_id', p_scope, 'capability', v_scope.capability, 'used', v_scope.used));
        RETURN v_scope;
    END IF;
    SELECT * INTO v_scope FROM approval_scopes WHERE tenant_id = p_tenant AND id = p_scope;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'approval scope', DETAIL = p_scope;
    END IF;
    RETURN v_scope;
END
$$;
